"""Random layouts of segments, by brute force which rows each row sees, and attention over them as a loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from twofold.functional.attention import Scoring
from twofold.functional.segments import Segment

Trees = Sequence[tuple[int, Sequence[int]]]
"""For each prefix its length, and the lengths of the segments that continue it; a prefix of 0 is none."""


def segments_of(trees: Trees) -> list[Segment]:
    """Laid end to end, a prefix before those that continue it."""
    found, row = [], 0
    for shared, lengths in trees:
        start = row
        if shared:
            found.append(Segment(start, shared))
            row += shared
        for length in lengths:
            found.append(Segment(row, length, start, shared) if shared else Segment(row, length))
            row += length
    return found


def rows_of(segments: Sequence[Segment], fillers: int = 1) -> int:
    """Rows of a batch of these segments, filler at the end."""
    return max(s.start + s.length for s in segments) + fillers


def contexts(segments: Sequence[Segment], window: int | None = None) -> dict[int, list[int]]:
    """The rows that each row sees, nearest last: its prefix, and its own segment up to itself."""
    found = {}
    for s in segments:
        prefix = list(range(s.prefix_start, s.prefix_start + s.prefix_length))
        for row in range(s.start, s.start + s.length):
            seen = prefix + list(range(s.start, row + 1))
            found[row] = seen if window is None else seen[-window:]
    return found


def asking(rows: int, real: Sequence[int], fillers: int = 1) -> Tensor:
    """Query rows: the real ones, and filler."""
    return torch.tensor([*real, *[rows - 1] * fillers])


def attention_by_loops(
    q: Tensor, k: Tensor, v: Tensor, asked: Sequence[int], seen: dict[int, list[int]], scoring: Scoring
) -> Tensor:
    """One query and head at a time; q holds the queries of the asked rows, and may hold more."""
    group, found = q.shape[1] // k.shape[1], []
    for i, row in enumerate(asked):
        heads = []
        for h in range(q.shape[1]):
            scores = k[seen[row], h // group] @ q[i, h] * scoring.scale
            if scoring.softcap:
                scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
            heads.append(torch.softmax(scores, 0) @ v[seen[row], h // group])
        found.append(torch.stack(heads))
    return torch.stack(found)


trees = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 20), min_size=1, max_size=4)), min_size=1, max_size=4
)
