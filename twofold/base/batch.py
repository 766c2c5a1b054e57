"""Examples as tokens, and the packed batch that data makes and training eats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Example(NamedTuple):
    """Token ids, and which of them the model learns to produce (its own loss is counted where True)."""

    token_ids: list[int]
    supervised: list[bool]

    @property
    def supervised_tokens(self) -> int:
        """The first token of an example has nothing before it to be predicted from."""
        return sum(self.supervised[1:])


@dataclass(frozen=True)
class PackedBatch:
    """Examples end to end in one row of tokens, without padding.

    Attributes:
        token_ids: (rows,).
        positions: (rows,) place of each token in its own example.
        lengths: tokens of each example.
        predicting: (supervised,) the rows whose next token counts.
        labels: (supervised,) that next token.
    """

    token_ids: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]
    lengths: tuple[int, ...]
    predicting: Int[Tensor, " supervised"]
    labels: Int[Tensor, " supervised"]

    @property
    def tokens(self) -> int:
        return self.token_ids.numel()

    @property
    def supervised_tokens(self) -> int:
        return self.labels.numel()

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device."""
        moved = {n: getattr(self, n).to(device) for n in ("token_ids", "positions", "predicting", "labels")}
        return replace(self, **moved)


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples end to end; no label crosses from one to the next."""
    token_ids = torch.tensor([t for e in examples for t in e.token_ids])
    counts = torch.tensor([s and i > 0 for e in examples for i, s in enumerate(e.supervised)], dtype=torch.bool)
    at = counts.nonzero()[:, 0]
    return PackedBatch(
        token_ids=token_ids,
        positions=torch.cat([torch.arange(len(e.token_ids)) for e in examples]),
        lengths=tuple(len(e.token_ids) for e in examples),
        predicting=at - 1,
        labels=token_ids[at],
    )


def idle_batch() -> PackedBatch:
    """Two tokens to run for company, their loss multiplied by zero: where weights are sharded, every process must take
    part in every forward pass, also when it has no example of its own left."""
    return pack([Example([0, 0], [False, True])])


class PaddedBatch(NamedTuple):
    """The same examples side by side, padded on the right, for models that know no packing."""

    token_ids: Int[Tensor, "examples length"]
    attention_mask: Int[Tensor, "examples length"]
    rows: Int[Tensor, " supervised"]
    """Flat places (example * length + position) of the rows whose next token counts."""
    labels: Int[Tensor, " supervised"]


def pad(batch: PackedBatch, pad_id: int) -> PaddedBatch:
    """Unpack a batch; padding is masked and never supervised, whatever its token."""
    longest = max(batch.lengths)
    device = batch.token_ids.device
    lengths = torch.tensor(batch.lengths, device=device)
    real: Bool[Tensor, "examples length"] = torch.arange(longest, device=device) < lengths[:, None]
    token_ids = torch.full(real.shape, pad_id, device=device, dtype=torch.long)
    token_ids[real] = batch.token_ids
    place_of_row = real.flatten().nonzero()[:, 0]
    return PaddedBatch(token_ids, real.long(), place_of_row[batch.predicting], batch.labels)
