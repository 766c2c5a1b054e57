"""The rows of a batch that must be computed: shared prefixes once, and nothing behind the last token that is predicted.

Examples often begin alike, with the same system prompt and template. In a causal decoder the hidden states of such a
prefix do not depend on what follows, so they are computed once and every continuation attends to their keys and values: exact in
loss and gradient. (With dropout, the masks of a prefix are drawn once for all that continue it.) And a row from which nothing is
predicted, and which no later row looks back to, has no influence on the loss: the last tokens of an example are such rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from twofold.base.batch import PackedBatch
from twofold.functional.segments import Segment, rounded_up

ROW_MULTIPLE = 16
"""Rows are filled up to a multiple of this: kernels are prepared, and kept, for every number of rows that occurs, and
few numbers then occur. The filler belongs to no example: it attends to nothing and nothing attends to it."""
SHARED_FROM = 8
"""Tokens that examples must begin with alike for their prefix to be computed once."""


@dataclass(frozen=True)
class Layout:
    """Rows as they are computed, on the CPU.

    Attributes:
        token_ids, positions: (rows,), filled up with zeros.
        texts: each example's tokens, as far as they are needed.
        own: the segment of each example that continues its prefix, if it has one.
        segments: what attends to what; of no length are left out, prefixes are in.
        asked: the distinct rows from which something is predicted, ascending, filled up with the last row.
        predicting: for each label the number of its row among `asked`.
        labels: (supervised,) the tokens to predict.
    """

    token_ids: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]
    texts: tuple[Tensor, ...]
    own: tuple[Segment, ...]
    segments: tuple[Segment, ...]
    asked: Int[Tensor, " asked"]
    predicting: Int[Tensor, " supervised"]
    labels: Int[Tensor, " supervised"]

    @property
    def rows(self) -> int:
        return self.token_ids.numel()

    @property
    def computed(self) -> int:
        """Rows without the filler."""
        return sum(s.length for s in self.segments)


def lay_out(batch: PackedBatch, *, share: bool, whole: bool = False) -> Layout:
    """The rows of a packed batch, prefixes shared or not; with `whole`, every token's row is asked for."""
    if whole:
        batch = replace(batch, predicting=torch.arange(batch.tokens), labels=batch.token_ids)
    starts = torch.tensor([0, *batch.lengths]).cumsum(0)
    example = torch.searchsorted(starts, batch.predicting, right=True) - 1
    offsets = batch.predicting - starts[example]
    needed = torch.zeros(len(batch.lengths), dtype=torch.long)
    needed.scatter_reduce_(0, example, offsets + 1, "amax")
    texts = tuple(
        batch.token_ids[start : start + count]
        for start, count in zip(starts[:-1].tolist(), needed.tolist(), strict=True)
    )
    segments, own = _segments(texts, share=share)
    place = torch.where(
        offsets < torch.tensor([s.prefix_length for s in own])[example],
        torch.tensor([s.prefix_start for s in own])[example] + offsets,
        torch.tensor([s.start - s.prefix_length for s in own])[example] + offsets,
    )
    rows = rounded_up(1 + max((s.start + s.length for s in segments), default=0), ROW_MULTIPLE)
    token_ids, positions = torch.zeros(2, rows, dtype=torch.long)
    for text, segment in zip(texts, own, strict=True):
        put(token_ids, text, segment)
        put(positions, torch.arange(len(text)), segment)
    distinct, predicting = place.unique(return_inverse=True)
    filler = torch.full((rounded_up(len(distinct) + 1, ROW_MULTIPLE) - len(distinct),), rows - 1)
    return Layout(token_ids, positions, texts, own, segments, torch.cat([distinct, filler]), predicting, batch.labels)


def put(rows: Tensor, values: Tensor, segment: Segment) -> None:
    """Write an example's values, one a token, to the rows of its prefix and of its own segment."""
    shared = segment.prefix_length
    rows[segment.prefix_start : segment.prefix_start + shared] = values[:shared]
    rows[segment.start : segment.start + segment.length] = values[shared:]


def _segments(texts: Sequence[Tensor], *, share: bool) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """All segments, and the one of each text that continues its prefix, if it has one."""
    segments: list[Segment] = []
    own: dict[int, Segment] = {}
    row = 0
    for members in _alike(texts) if share else [[i] for i in range(len(texts))]:
        shared = _common_prefix([texts[i] for i in members]) if len(members) > 1 else 0
        start = row
        if shared:
            segments.append(Segment(start, shared))
            row += shared
        for i in members:
            own[i] = Segment(row, len(texts[i]) - shared, start, shared) if shared else Segment(row, len(texts[i]))
            row += own[i].length
        segments += [own[i] for i in members if own[i].length]
    return tuple(segments), tuple(own[i] for i in range(len(texts)))


def _alike(texts: Sequence[Tensor]) -> list[list[int]]:
    """The texts by how they begin."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, text in enumerate(texts):
        beginning = tuple(text[:SHARED_FROM].tolist())
        found.setdefault(beginning if len(beginning) == SHARED_FROM else (-1, i), []).append(i)
    return list(found.values())


def _common_prefix(texts: Sequence[Tensor]) -> int:
    """Tokens with which all begin."""
    shortest = min(len(t) for t in texts)
    alike = torch.stack([t[:shortest] for t in texts])
    differing = (alike != alike[0]).any(0).nonzero()
    return int(differing[0]) if len(differing) else shortest
