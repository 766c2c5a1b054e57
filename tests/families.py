"""Tiny random models of every family, one builder each: two layers, 64 tokens, float32, the same bits every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 64
DECODER = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = DECODER | {"num_key_value_heads": 2}
BERT = {k: v for k, v in DECODER.items() if k not in ("bos_token_id", "eos_token_id")}

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True, attention_bias=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=16)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=None)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **GROUPED, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=5.0, sliding_window=4
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **GROUPED, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "mistral-window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=4)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0])),
    "phi3": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(
            **GROUPED,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            sliding_window=None,
        )
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**DECODER)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_no_dropout("pdrop"))
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.0,
        )
    ),
    "bert": lambda: hf.BertForMaskedLM(
        hf.BertConfig(**BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
    "bert-classifier": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
}
FAMILIES = sorted(BUILDERS)
CAUSAL = [f for f in FAMILIES if not f.startswith(("bert", "t5"))]
DESCRIBED = [f for f in CAUSAL if f not in ("gpt2", "opt", "phi")]


def _no_dropout(ending: str) -> dict[str, float]:
    return {f"{part}_{ending}": 0.0 for part in ("resid", "embd", "attn")}


def build_model(family: str, seed: int = 7) -> Any:
    """A fresh model; random biases and norms too, so that nothing is right only because it is zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BUILDERS[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def token_ids(*shape: int, seed: int = 3) -> Tensor:
    """Random ids above the special ones."""
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def inputs(model: Any, rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    """A batch that the model's forward takes."""
    batch = {"input_ids": token_ids(rows, length)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = token_ids(rows, length, seed=4)
    return batch


def logits(model: Any) -> Tensor:
    """The logits of that batch."""
    found: Tensor = model(**inputs(model)).logits
    return found


def randomise(parameters: Any, seed: int = 11, scale: float = 0.2) -> None:
    """Give named trainable tensors values that depend on their names alone, in whatever order they come."""
    for name, parameter in sorted(parameters, key=lambda pair: pair[0]):
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
