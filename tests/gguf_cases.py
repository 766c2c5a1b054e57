"""Tiny bases with tokenizers that llama.cpp knows, and adapters on them."""

from __future__ import annotations

import io
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import transformers as hf
from families import BUILDERS, GROUPED, build_model, randomise
from tiny_adapters import learned

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.base.load import DEFAULT_BASE, locate

TEXT = (
    "the sea is wide and the shore is near",
    "name three fruits: an apple, a pear",
    "two and two",
    "a small boat",
) * 20
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0} | {
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WITH_ROOM = {**GROUPED, "vocab_size": 72}
"""Transformers' tokenizer for Qwen2 adds a token of its own to the 64."""
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", LLAMA_3),
    "linear": ("llama", {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}),
    "yarn": (
        "qwen2",
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    ),
}


@cache
def pieces() -> bytes:
    """A SentencePiece model of 64 tokens."""
    found = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=found,
        vocab_size=64,
        model_type="bpe",
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return found.getvalue()


def with_pieces(folder: Path, model: Any) -> Path:
    """A model's folder, with that tokenizer in it."""
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(pieces())
    said = {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def with_smollm(folder: Path, family: str) -> Path:
    """A tiny model of that family with SmolLM2's tokenizer, which is BPE over bytes."""
    small = model_of(family)
    model = type(small)(type(small.config)(**{**small.config.to_dict(), "vocab_size": 49152}))
    randomise(model.named_parameters(), scale=0.05)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(locate(DEFAULT_BASE)) / name, folder / name)
    return folder


def of_rope(name: str) -> Any:
    """A model whose rotary embedding is scaled."""
    family, rope = ROPES[name]
    kind = {"llama": (hf.LlamaForCausalLM, hf.LlamaConfig), "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config)}[family]
    model = kind[0](kind[1](**WITH_ROOM, rope_parameters=rope)).eval()
    randomise(model.named_parameters())
    return model


def model_of(family: str) -> Any:
    """A model by its family's name, or by that of its rotary embedding; Gemmas scale attention as llama.cpp does."""
    if family == "one-embedding":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)).eval()
    elif family == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**WITH_ROOM)).eval()
    elif family == "qwen3":  # of a head's size transformers' reader of such files knows Qwen3's own alone
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=128)).eval()
    elif family == "code-llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "vocab_size": 32016})).eval()
    elif family == "gemma":  # with room for the token that ends its turns
        model = hf.GemmaForCausalLM(
            hf.GemmaConfig(**{**build_model("gemma").config.to_dict(), "vocab_size": 128})
        ).eval()
    elif family in ("gemma2", "gemma3"):
        small = build_model(family)
        model = type(small)(type(small.config)(**{**small.config.to_dict(), "query_pre_attn_scalar": 8})).eval()
    else:
        return build_model(family) if family in BUILDERS else of_rope(family)
    randomise(model.named_parameters())
    return model


def adapter_of(model: Any, folder: Path, **settings: Any) -> Path:
    """An adapter that says something, on a model that is changed by it."""
    attach(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    randomise(learned(model), scale=0.1)
    save_adapter(model, folder)
    return folder
