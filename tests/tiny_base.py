"""Tiny bases on disk, each with a tokenizer of its own, and tiny data: a whole training over them takes a second.

`tiny_fixtures.py` makes fixtures of them.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_CACHE = tempfile.mkdtemp(prefix="twofold-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["HF_DATASETS_CACHE"] = _CACHE  # nothing has imported `datasets` yet: tests leave the user's cache alone

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ("red", "green", "blue", "black")
THINGS = ("cup", "hat", "boat", "lamp", "door", "coat", "chair", "shoe", "fence", "kite")
POSITIONS = 256


def tokenizer(template: str | None = CHATML) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens, whose end of turn is `<|im_end|>`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([m["content"] for row in chats(40) for m in row["messages"]], trainer)
    found = hf.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    found.chat_template = template
    return found


def write_base(folder: Path, model: Any, tokens: hf.PreTrainedTokenizerFast) -> Path:
    """A model folder as Hugging Face writes it."""
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def llama(vocabulary: int, seed: int = 1, **settings: Any) -> hf.LlamaForCausalLM:
    """Two layers, random, with weights large enough for answers to differ."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(
        **sizes,
        vocab_size=vocabulary,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        **settings,
    )
    return hf.LlamaForCausalLM(config).eval()


def gpt2(vocabulary: int, seed: int = 1) -> hf.GPT2LMHeadModel:
    """The same size, of a family that runs through its own forward."""
    torch.manual_seed(seed)
    quiet = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": 2, "eos_token_id": 2, "initializer_range": 0.15}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=vocabulary, **sizes, **quiet, **ends)).eval()


def pairs(count: int, start: int = 0) -> list[tuple[str, str]]:
    """Questions and answers of a task that a tiny model can learn: the colour follows from the thing."""
    chosen = [THINGS[i % len(THINGS)] for i in range(start, start + count)]
    return [(f"colour of the {t} {i}?", f"{COLOURS[len(t) % 4]} {t}") for i, t in enumerate(chosen, start)]


def chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    """The same as conversations."""
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs(count, start)
    ]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
