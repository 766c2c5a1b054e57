"""Random examples, adapted models, and the loss written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from families import VOCABULARY, build_model, randomise
from torch import Tensor, nn

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.base.batch import Example


def some_examples(*lengths: int, seed: int = 5) -> list[Example]:
    """Examples of these lengths: a prompt, then an answer, with one unsupervised hole in it."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
        examples.append(Example(ids, [i >= length // 3 and i != length // 2 for i in range(length)]))
    return examples


def adapted(family: str, dropout: float = 0.0, target: str = "all-linear") -> Any:
    model = build_model(family)
    attach(model, LoraConfig(r=4, lora_alpha=8, target_modules=target, lora_dropout=dropout))
    randomise(list(learned(model).items()), scale=0.1)
    return model


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def by_hand(model: Any, examples: Sequence[Example]) -> tuple[Tensor, int]:
    """Loss sum and hits of the examples, one at a time, from the logits of every row."""
    total, correct = torch.zeros(()), 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.token_ids])).logits[0]
        for at in range(1, len(example.token_ids)):
            if example.supervised[at]:
                total = total + F.cross_entropy(logits[at - 1].double(), torch.tensor(example.token_ids[at]))
                correct += int(logits[at - 1].argmax()) == example.token_ids[at]
    return total, correct
