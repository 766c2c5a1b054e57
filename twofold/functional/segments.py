"""Which rows of a packed batch attend to which, laid out for batched products.

A batch is one flat row of tokens. Its *segments* lie end to end; the tokens of one attend to each other, causally. A segment
may continue a *prefix*: rows that several segments have in common, computed once and seen by each of their tokens.

Only for attention are segments brought side by side. Segments of the same prefix and of similar length form a *bucket*, padded
on the right. The queries of a bucket are taken in *chunks*, so that score matrices stay small however long a segment is; a
chunk sees the keys up to its last query, and only the keys that not all of its queries may see are masked.

Every number here is known before a batch is run, so it is computed once a batch, on the CPU, and moved to the device.
At least one row of the batch, and one place of every bucket, must be *filler*: nothing attends to it and its gradient is
exactly zero, so that whatever has no place of its own can be read from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

BUCKET_WASTE = 0.8
"""A segment joins a bucket when it is at least this share of the bucket's longest."""
SHORT = 96
"""Segments up to this length are not worth a bucket of their own, however unequal."""
LENGTH_MULTIPLE = 16
"""Buckets are padded to a multiple of this, so that kernels meet few lengths."""
MASKED_WHOLE = 512
"""Keys up to which a chunk's mask covers all of them, since adding to a part of a row is slower than to a whole one."""
CHUNK_SCORES = 1 << 22
"""Scores of one chunk, all heads and segments together."""
CHUNK_MULTIPLE = 64


class Segment(NamedTuple):
    """Rows [start, start + length), continuing the rows [prefix_start, prefix_start + prefix_length)."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True)
class Heads:
    """Query heads, and the key heads that they share in equal groups."""

    queries: int
    keys: int

    @property
    def group(self) -> int:
        return self.queries // self.keys


@dataclass(frozen=True)
class Chunk:
    """Some queries of a bucket and the keys that they see.

    Attributes:
        queries: slice of the places (place * group + head in group).
        keys: slice of the keys, prefix first.
        mask: (1 or segments * key heads, queries, masked keys) 0 or -inf, added to the scores of the last keys.
    """

    queries: slice
    keys: slice
    mask: Float[Tensor, "batch places masked"]


@dataclass(frozen=True)
class Bucket:
    """Segments of one prefix and of similar length.

    Attributes:
        segments: how many.
        queries: (segments * key heads * places * group,) where each query lies among (row, head).
        keys: (segments * key heads * (prefix + places),) where each key lies among (row, key head).
        prefix: the rows of the prefix.
    """

    segments: int
    queries: Int[Tensor, " query_places"]
    keys: Int[Tensor, " key_places"]
    prefix: slice
    chunks: tuple[Chunk, ...]

    @property
    def prefix_length(self) -> int:
        return int(self.prefix.stop - self.prefix.start)


class Spans(NamedTuple):
    """The segments as they lie, for a kernel that brings nothing side by side; on the CPU.

    Attributes:
        table: (segments, 6) where each starts and its length, both of its prefix, the number of its first query, how many it has.
        asking: the row of each query.
        window: a query sees so many keys.
    """

    table: Int[Tensor, "segments 6"]
    asking: Int[Tensor, " query_rows"]
    window: int | None

    @property
    def keys_seen(self) -> int:
        """By all queries together."""
        found = 0
        for start, _, _, prefix_length, first, queries in self.table.tolist():
            seen = prefix_length + 1 + self.asking[first : first + queries] - start
            found += int(seen.clamp_max(self.window or int(seen.max())).sum())
        return found


@dataclass(frozen=True)
class AttentionPlan:
    """The buckets of a batch, and where each row is found in their results, laid end to end.

    Attributes:
        outputs: (query rows * query heads,) the place of each row's head among all buckets' queries.
        own_keys: (rows * key heads,) the place of each row's key head among all buckets' keys; as a prefix it has others.
    """

    heads: Heads
    buckets: tuple[Bucket, ...]
    outputs: Int[Tensor, " row_heads"]
    own_keys: Int[Tensor, " row_key_heads"]
    spans: Spans


class _Member(NamedTuple):
    """A segment with those of its rows that ask: their places in the segment, and their numbers among all queries."""

    segment: Segment
    asking: Tensor
    numbers: Tensor


def plan_attention(
    segments: Sequence[Segment],
    rows: int,
    heads: Heads,
    like: Tensor,
    queries: Int[Tensor, " query_rows"] | None = None,
    window: int | None = None,
) -> AttentionPlan:
    """Lay out attention over a batch.

    Args:
        segments: of the batch; prefixes are segments too.
        rows: of the batch, of which the last is filler.
        like: a tensor of the device and type that attention computes in.
        queries: the rows that ask, ascending, the last of them filler; all rows when not given.
        window: a query sees so many keys, itself included; all before it when not given.
    """
    asking = torch.arange(rows) if queries is None else queries
    members = [m for m in (_member(s, asking) for s in segments) if len(m.numbers)]
    uniform = queries is None
    laid = [_lay_out(group, rows, len(asking), heads, like, window, uniform) for group in _grouped(members)]
    outputs = _inverse([b.queries for b in laid], len(asking) * heads.queries)
    own = [_own_keys(b, heads) for b in laid]
    device = like.device
    return AttentionPlan(
        heads,
        tuple(Bucket(b.segments, b.queries.to(device), b.keys.to(device), b.prefix, b.chunks) for b in laid),
        outputs.to(device),
        _inverse(own, rows * heads.keys).to(device),
        Spans(_table(members), asking, window),
    )


def _table(members: Sequence[_Member]) -> Tensor:
    return torch.tensor([[*m.segment, int(m.numbers[0]), len(m.numbers)] for m in members], dtype=torch.long).view(
        -1, 6
    )


def _member(segment: Segment, queries: Tensor) -> _Member:
    first, last = torch.searchsorted(queries, torch.tensor([segment.start, segment.start + segment.length])).tolist()
    return _Member(segment, queries[first:last] - segment.start, torch.arange(first, last))


def _grouped(members: Sequence[_Member]) -> list[list[_Member]]:
    """Members by prefix, and by length from the longest on."""
    groups: list[list[_Member]] = []
    for member in sorted(members, key=lambda m: (m.segment.prefix_start, m.segment.prefix_length, -m.segment.length)):
        longest = groups[-1][0].segment if groups else None
        if (
            longest is not None
            and longest[2:] == member.segment[2:]
            and (longest.length <= SHORT or member.segment.length >= BUCKET_WASTE * longest.length)
        ):
            groups[-1].append(member)
        else:
            groups.append([member])
    return groups


def rounded_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def _lay_out(
    group: list[_Member], rows: int, query_rows: int, heads: Heads, like: Tensor, window: int | None, uniform: bool
) -> Bucket:
    """The bucket of a group; its index tensors still on the CPU."""
    count, first = len(group), group[0].segment
    query_places = rounded_up(1 + max(len(m.numbers) for m in group), LENGTH_MULTIPLE)
    seen = first.prefix_length + 1 + max(m.segment.length for m in group)
    key_places = rounded_up(seen, LENGTH_MULTIPLE) - first.prefix_length
    asking = torch.full((count, query_places), query_rows - 1)
    limits = torch.zeros(count, query_places, dtype=torch.long)
    keys = torch.full((count, key_places), rows - 1)
    for i, (segment, at, numbers) in enumerate(group):
        asking[i, : len(numbers)] = numbers
        limits[i] = segment.prefix_length + int(at[-1])
        limits[i, : len(at)] = segment.prefix_length + at
        keys[i, : segment.length] = torch.arange(segment.start, segment.start + segment.length)
    if uniform:
        limits = torch.arange(first.prefix_length, first.prefix_length + query_places)[None]
        limits = limits.clamp_max(first.prefix_length + key_places - 1)  # no filler's window lies behind the last key
    prefix = torch.arange(first.prefix_start, first.prefix_start + first.prefix_length).expand(count, -1)
    by_head = torch.arange(heads.queries).view(heads.keys, 1, heads.group)
    return Bucket(
        segments=count,
        queries=(asking[:, None, :, None] * heads.queries + by_head).flatten(),
        keys=(torch.cat([prefix, keys], 1)[:, None] * heads.keys + torch.arange(heads.keys)[:, None]).flatten(),
        prefix=slice(first.prefix_start, first.prefix_start + first.prefix_length),
        chunks=_chunks(limits, count, first.prefix_length + key_places, heads, like, window),
    )


def _own_keys(bucket: Bucket, heads: Heads) -> Tensor:
    """A bucket's keys with those of the prefix marked -1: they are not the prefix rows' own place."""
    keys = bucket.keys.view(bucket.segments * heads.keys, -1).clone()
    keys[:, : bucket.prefix_length] = -1
    return keys.flatten()


def _inverse(found: list[Tensor], values: int) -> Tensor:
    """Where each of `values` numbers stands in the lists laid end to end; what stands nowhere is found with the filler, the last
    of the numbers. (-1 in a list lands behind the end.)"""
    joined = torch.cat(found)
    places = torch.full((values + 1,), -1)
    places[joined] = torch.arange(len(joined))
    return torch.where(places < 0, places[values - 1], places)[:values]


def _chunks(
    limits: Int[Tensor, "batch places"], segments: int, keys: int, heads: Heads, like: Tensor, window: int | None
) -> tuple[Chunk, ...]:
    places = limits.shape[1]
    per_place = segments * heads.queries * keys
    size = max(CHUNK_MULTIPLE, CHUNK_SCORES // per_place // CHUNK_MULTIPLE * CHUNK_MULTIPLE)
    return tuple(_chunk(limits[:, at : at + size], at, keys, heads, like, window) for at in range(0, places, size))


def _chunk(limits: Tensor, start: int, keys: int, heads: Heads, like: Tensor, window: int | None) -> Chunk:
    nearest, furthest = int(limits.min()), int(limits.max())
    begin = 0 if window is None else max(0, nearest - window + 1)
    end = min(keys, rounded_up(furthest + 1, LENGTH_MULTIPLE))
    masked_from = begin if window is not None or end - begin <= MASKED_WHOLE else nearest + 1
    at = torch.arange(min(masked_from, end), end)
    hidden = at > limits[..., None]
    if window is not None:
        hidden |= at <= limits[..., None] - window
    mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, float("-inf"))
    mask = mask.repeat_interleave(heads.group, 1)
    if len(mask) > 1:
        mask = mask.repeat_interleave(heads.keys, 0)
    stop = start + limits.shape[1]
    return Chunk(slice(start * heads.group, stop * heads.group), slice(begin, end), mask.to(like.device))
