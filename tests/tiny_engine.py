"""Tiny models of the families that the engine decodes, adapters for them, and what PEFT answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from families import GROUPED, VOCABULARY

from twofold.adapter.attach import attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.engine.request import Request
from twofold.engine.scheduler import Made, Scheduler

WIDE = GROUPED | {"head_dim": 16, "max_position_embeddings": 256}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**GROUPED | {"num_attention_heads": 2, "num_key_value_heads": 1})
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WIDE)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**WIDE, no_rope_layers=[1, 0])),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**WIDE, sliding_window=None)),
    "mistral-window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**WIDE, sliding_window=4)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**WIDE)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**WIDE, final_logit_softcapping=4.0, attn_logit_softcapping=5.0, sliding_window=4)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**WIDE, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(**GROUPED | {"num_attention_heads": 2, "num_key_value_heads": 1}, sliding_window=None)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    ),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": PROJECTIONS},
    "rs": {"r": 20, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dora": {"r": 3, "use_dora": True, "target_modules": PROJECTIONS},
    "biased": {"r": 2, "lora_bias": True, "target_modules": ["k_proj", "up_proj", "o_proj"]},
    "words": {"r": 4, "target_modules": ["embed_tokens", "v_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "gate_proj"]},
    "ranks": {"r": 4, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"o_proj": 1}, "target_modules": PROJECTIONS},
}
FOR_OTHERS = {
    "phi3": {"plain": {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}},
    "gpt2": {"plain": {"r": 4, "target_modules": ["c_attn", "c_proj"]}, "few": {"r": 2, "target_modules": ["c_fc"]}},
}


def sharp(family: str) -> Any:
    """A model whose greedy answers are no ties: its logits are spread wide."""
    torch.manual_seed(11)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
            elif "bias" in name:
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Folders of adapters for a family, made by Twofold, every tensor of them random."""
    made: dict[str, dict[str, Path]] = {}

    def write(family: str) -> dict[str, Path]:
        if family not in made:
            root, model = tmp_path_factory.mktemp(family), sharp(family)
            configs = FOR_OTHERS.get(family, ADAPTERS)
            for i, (name, config) in enumerate(configs.items()):
                attach(model, LoraConfig(**{"lora_alpha": 8} | config))
                generator = torch.Generator().manual_seed(i)
                for parameter in (p for p in model.parameters() if p.requires_grad):
                    parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
                save_adapter(model, root / name)
                detach(model)
            made[family] = {name: root / name for name in configs}
        return made[family]

    return write


def alone(model: Any, folder: Path | None, prompt: list[int], new: int) -> list[int]:
    """PEFT's greedy answer, this prompt alone."""
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    mask = torch.ones_like(ids)
    found = model.generate(input_ids=ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, **settings)
    said: list[int] = found[0, len(prompt) :].tolist()
    return said


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(4, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(scheduler: Scheduler, requests: list[Request]) -> list[list[int]]:
    numbers = [scheduler.add(r) for r in requests]
    said: dict[int, list[int]] = {n: [] for n in numbers}
    while not scheduler.idle:
        for event in scheduler.step():
            if isinstance(event, Made):
                said[event.stream].append(event.token)
    return [said[n] for n in numbers]
