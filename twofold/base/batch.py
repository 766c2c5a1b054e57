"""Examples as tokens, and the packed batch that data makes and training eats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Example(NamedTuple):
    """Token ids, and which of them the model learns to produce (its own loss is counted where True).

    An example may have a class instead: it is predicted once, from all of it, and counts as one supervised token.
    """

    token_ids: list[int]
    supervised: list[bool]
    label: int | None = None

    @property
    def supervised_tokens(self) -> int:
        """The first token of an example has nothing before it to be predicted from."""
        return sum(self.supervised[1:]) + (self.label is not None)

    def first(self, tokens: int) -> Example:
        """Its beginning."""
        return self._replace(token_ids=self.token_ids[:tokens], supervised=self.supervised[:tokens])


@dataclass(frozen=True)
class PackedBatch:
    """Examples end to end in one row of tokens, without padding.

    Attributes:
        token_ids: (rows,).
        positions: (rows,) place of each token in its own example.
        lengths: tokens of each example.
        predicting: (supervised,) the rows whose next token counts.
        labels: (supervised,) that next token, or the class of the example which ends in that row.
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
    lengths = tuple(len(e.token_ids) for e in examples)
    predicting, labels = _classes(examples, lengths) or _next_tokens(examples, token_ids)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return PackedBatch(token_ids, positions, lengths, predicting, labels)


def _next_tokens(examples: Sequence[Example], token_ids: Tensor) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([s and i > 0 for e in examples for i, s in enumerate(e.supervised)], dtype=torch.bool)
    at = counts.nonzero()[:, 0]
    return at - 1, token_ids[at]


def _classes(examples: Sequence[Example], lengths: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """The last row and the class of each example; None where they have none."""
    labels = [e.label for e in examples if e.label is not None]
    return (torch.tensor(lengths).cumsum(0) - 1, torch.tensor(labels)) if labels else None


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
