"""In which order the examples are seen: a function of seed and epoch alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from twofold.base.batch import Example, PackedBatch, pack


@lru_cache(maxsize=2)
def epoch_order(examples: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the examples for one epoch."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order: list[int] = torch.randperm(examples, generator=generator).tolist()
    return order


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimiser steps in an epoch; the last may hold fewer examples."""
    return -(-examples // batch_size)


def examples_seen(examples: int, batch_size: int, steps: int) -> int:
    """Examples, counted each time, in so many optimiser steps."""
    epochs, more = divmod(steps, steps_per_epoch(examples, batch_size))
    return epochs * examples + min(more * batch_size, examples)


def step_indices(examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The examples of optimiser step `step`, counted from 0 over all epochs."""
    epoch, at = divmod(step, steps_per_epoch(examples, batch_size))
    return epoch_order(examples, seed, epoch)[at * batch_size : (at + 1) * batch_size]


def micro_batches(examples: Sequence[Example], size: int | None, tokens: int | None = None) -> list[PackedBatch]:
    """A step's examples in packed batches of at most `size` examples and about `tokens` tokens; a longer example is alone."""
    groups: list[list[Example]] = []
    for example in examples if tokens is None else sorted(examples, key=lambda e: -len(e.token_ids)):
        room = (
            g for g in groups if len(g) != size and (tokens is None or _tokens(g) + len(example.token_ids) <= tokens)
        )
        group = next(room, None)
        if group is None:
            groups.append(group := [])
        group.append(example)
    return [pack(g) for g in groups]


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(e.token_ids) for e in examples)


def evaluation_batches(examples: Sequence[Example], tokens: int) -> list[PackedBatch]:
    """Examples sorted by length, in packed batches of about `tokens` tokens: any order gives the same loss."""
    batches: list[list[Example]] = []
    held = tokens
    for example in sorted(examples, key=lambda e: len(e.token_ids)):
        if held + len(example.token_ids) > tokens:
            batches.append([])
            held = 0
        batches[-1].append(example)
        held += len(example.token_ids)
    return [pack(b) for b in batches]
