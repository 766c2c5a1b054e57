"""Tiny models that our own kernels can run: their widths are multiples of 16; and whose greedy answers are no ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from families import GROUPED
from torch import Tensor

from twofold.engine.scheduler import Made

WIDE = GROUPED | {"head_dim": 16, "max_position_embeddings": 256}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
WIDE_FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE, tie_word_embeddings=False)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED | HEADS, tie_word_embeddings=False)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WIDE, tie_word_embeddings=False)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**WIDE, sliding_window=4)),
}


def sharp(family: str) -> Any:
    """A frozen model with random weights whose logits are spread wide."""
    torch.manual_seed(11)
    model = WIDE_FAMILIES[family]().eval().requires_grad_(False)
    for parameter in (p for p in model.parameters() if p.dim() == 2):
        parameter.mul_(6)
    return model


class Said(NamedTuple):
    """An answer, token by token, with the log-probability that the engine gives each."""

    tokens: list[int]
    logprobs: Tensor


def said(events: list[Any], stream: int) -> Said:
    """What the scheduler's events say of a stream whose request asks for logprobs."""
    made = [e for e in events if isinstance(e, Made) and e.stream == stream]
    return Said([e.token for e in made], torch.tensor([e.logprobs.logprob for e in made if e.logprobs]))


@torch.no_grad()
def differs(model: Any, prompt: list[int], answer: Said) -> float:
    """How far a greedy answer is from what the model's own forward says, all at once: the greatest difference of a
    log-probability, or by how much a token of it is not the likeliest."""
    every = model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    theirs = every.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    return float(torch.maximum((answer.logprobs - theirs).abs(), every.amax(-1) - theirs).max())
