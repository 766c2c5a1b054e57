"""How a batch is laid out for attention: every row in one place of its own, little waste, and masks that say who sees whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_layouts import Trees, asking, contexts, rows_of, segments_of, trees
from torch import Tensor

from twofold.functional import segments as module
from twofold.functional.segments import (
    BUCKET_WASTE,
    LENGTH_MULTIPLE,
    SHORT,
    AttentionPlan,
    Bucket,
    Heads,
    Segment,
    plan_attention,
    rounded_up,
)

HEADS = Heads(6, 2)
LIKE = torch.zeros((), dtype=torch.float64)


@pytest.fixture(autouse=True, params=[0, SHORT], ids=["by length", "short ones together"])
def short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Up to which length segments share a bucket, however unequal."""
    monkeypatch.setattr(module, "SHORT", request.param)
    return int(request.param)


@st.composite
def batches(draw: Any) -> tuple[list[Segment], int, Tensor | None]:
    """Segments, rows, and the rows that ask: all, or some of them."""
    segments = segments_of(draw(trees))
    rows = rows_of(segments, draw(st.integers(1, 5)))
    if draw(st.booleans()):
        return segments, rows, None
    real = draw(st.sets(st.sampled_from(sorted(contexts(segments))), min_size=1))
    return segments, rows, asking(rows, sorted(real), draw(st.integers(1, 3)))


def all_queries(plan: AttentionPlan) -> Tensor:
    return torch.cat([b.queries for b in plan.buckets])


def own_keys(plan: AttentionPlan) -> Tensor:
    """What lies at each key place, all buckets end to end; -1 where a prefix is seen from a segment that continues it."""
    found = []
    for bucket in plan.buckets:
        keys = bucket.keys.view(bucket.segments * plan.heads.keys, -1).clone()
        keys[:, : bucket.prefix_length] = -1
        found.append(keys.flatten())
    return torch.cat(found)


@given(batch=batches(), window=st.sampled_from([None, 1, 3, 30]))
def test_every_query_and_every_key_has_one_place_of_its_own(
    batch: tuple[list[Segment], int, Tensor | None], window: int | None
) -> None:
    segments, rows, queries = batch
    plan = plan_attention(segments, rows, HEADS, LIKE, queries, window)
    asked = torch.arange(rows) if queries is None else queries
    real = torch.tensor([int(row) in contexts(segments) for row in asked])
    places = plan.outputs.view(len(asked), HEADS.queries)
    assert torch.equal(
        all_queries(plan)[places[real]].flatten(), torch.arange(plan.outputs.numel()).view_as(places)[real].flatten()
    )
    assert len(places[real].unique()) == places[real].numel()
    # a real query is asked once only
    found, times = all_queries(plan).unique(return_counts=True)
    at = (found // HEADS.queries).clamp_max(len(asked) - 1)
    assert bool((times[real[at]] == 1).all())
    # keys of every segment that asks
    seen = [s for s in segments if bool(((asked >= s.start) & (asked < s.start + s.length)).any())]
    numbers = torch.cat([torch.arange(s.start * HEADS.keys, (s.start + s.length) * HEADS.keys) for s in seen])
    own = plan.own_keys[numbers]
    assert torch.equal(own_keys(plan)[own], numbers)
    assert len(own.unique()) == len(own)


@given(batch=batches())
def test_whatever_has_no_place_is_found_at_a_padded_one(batch: tuple[list[Segment], int, Tensor | None]) -> None:
    segments, rows, queries = batch
    plan = plan_attention(segments, rows, HEADS, LIKE, queries)
    asked = torch.arange(rows) if queries is None else queries
    last_query, last_key = len(asked) * HEADS.queries - 1, rows * HEADS.keys - 1
    for row, at in zip(asked.tolist(), plan.outputs.view(len(asked), -1), strict=True):
        if row not in contexts(segments):
            assert (all_queries(plan)[at] // HEADS.queries == last_query // HEADS.queries).all()
    placed = set((own_keys(plan)[own_keys(plan) >= 0] // HEADS.keys).tolist())
    for row, at in enumerate(plan.own_keys.view(rows, -1)):
        if row not in placed or row == rows - 1:
            assert (own_keys(plan)[at] // HEADS.keys == last_key // HEADS.keys).all()
    for bucket in plan.buckets:  # and there is such a place in every segment of every bucket
        by_segment = (bucket.keys // HEADS.keys).view(bucket.segments, HEADS.keys, -1)
        assert (by_segment[..., -1] == rows - 1).all()
        askers = (bucket.queries // HEADS.queries).view(bucket.segments, HEADS.keys, -1)
        assert (askers[..., -1] == len(asked) - 1).all()


def visible(plan: AttentionPlan, bucket: Bucket, asked: Tensor) -> list[tuple[int, int, list[int]]]:
    """(row, head, the rows it sees) of every query place, read off the places and the masks."""
    group, found = plan.heads.group, []
    askers = bucket.queries.view(bucket.segments * plan.heads.keys, -1)
    keys = bucket.keys.view(bucket.segments * plan.heads.keys, -1)
    for chunk in bucket.chunks:
        inside = keys[:, chunk.keys]
        width = inside.shape[1]
        count = askers[:, chunk.queries].shape[1]
        shown = torch.ones(len(keys), count, width, dtype=torch.bool)
        if masked := chunk.mask.shape[-1]:
            assert set(chunk.mask.unique().tolist()) <= {0.0, float("-inf")}
            shown[..., width - masked :] = chunk.mask.expand(len(keys), -1, -1) == 0
        for i, row_of_batch in enumerate(askers[:, chunk.queries].tolist()):
            for j, number in enumerate(row_of_batch):
                head = number % plan.heads.queries
                seen = inside[i][shown[i, j]]
                assert len(seen), "a query that sees nothing has no softmax"
                assert (seen % plan.heads.keys == head // group).all()
                found.append((int(asked[number // plan.heads.queries]), head, (seen // plan.heads.keys).tolist()))
    return found


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "in chunks"])
@given(batch=batches(), window=st.sampled_from([None, 1, 3, 30]))
def test_the_masks_show_each_query_what_it_may_see_and_nothing_else(
    chunked: bool, batch: tuple[list[Segment], int, Tensor | None], window: int | None
) -> None:
    segments, rows, queries = batch
    with pytest.MonkeyPatch.context() as patch:
        if chunked:
            patch.setattr(module, "CHUNK_SCORES", 1)
            patch.setattr(module, "CHUNK_MULTIPLE", 4)
        plan = plan_attention(segments, rows, HEADS, LIKE, queries, window)
    asked = torch.arange(rows) if queries is None else queries
    expected = contexts(segments, window)
    done = set()
    for bucket in plan.buckets:
        for row, head, seen in visible(plan, bucket, asked):
            if row in expected:
                assert sorted(seen) == sorted(expected[row])
                done.add((row, head))
    assert done == {(row, h) for row in asked.tolist() if row in expected for h in range(HEADS.queries)}


@given(batch=batches())
def test_buckets_waste_little(batch: tuple[list[Segment], int, Tensor | None]) -> None:
    """At most the share that bucketing allows, one filler and the rounding, but for short ones; and every segment has a place."""
    segments, rows, queries = batch
    plan = plan_attention(segments, rows, HEADS, LIKE, queries)
    for bucket in plan.buckets:
        places = bucket.keys.numel() // (bucket.segments * HEADS.keys) - bucket.prefix_length
        assert (bucket.prefix_length + places) % LENGTH_MULTIPLE == 0
        own = bucket.keys.view(bucket.segments, HEADS.keys, -1)[:, 0, bucket.prefix_length :] // HEADS.keys
        lengths = (own < rows - 1).sum(1)
        longest = int(lengths.max())
        assert longest < places <= longest + LENGTH_MULTIPLE
        assert longest <= module.SHORT or int(lengths.min()) >= BUCKET_WASTE * longest
    if queries is None:
        assert sum(b.segments for b in plan.buckets) == len(segments)


def test_segments_of_like_length_and_prefix_share_a_bucket(short: int) -> None:
    alike: Trees = [(0, [20, 18, 19, 5]), (8, [20, 20])]
    segments = segments_of(alike)
    plan = plan_attention(segments, rows_of(segments), HEADS, LIKE)
    found = sorted((b.segments, b.prefix_length) for b in plan.buckets)
    assert found == ([(2, 8), (5, 0)] if short else [(1, 0), (1, 0), (2, 8), (3, 0)])


def test_uniform_buckets_share_one_mask_and_chunks_see_no_key_behind_their_last_query() -> None:
    segments = segments_of([(0, [300, 300])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_SCORES", 1)
        plan = plan_attention(segments, rows_of(segments), HEADS, LIKE)
    (bucket,) = plan.buckets
    assert len(bucket.chunks) > 1
    for chunk in bucket.chunks:
        assert len(chunk.mask) == 1
        last = chunk.queries.stop // HEADS.group
        assert chunk.keys == slice(0, min(rounded_up(last, LENGTH_MULTIPLE), bucket.keys.numel() // 4))


def test_a_window_shortens_what_a_chunk_reads() -> None:
    segments = segments_of([(0, [400])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_SCORES", 1)
        plan = plan_attention(segments, rows_of(segments), HEADS, LIKE, window=10)
    (bucket,) = plan.buckets
    for chunk in bucket.chunks:
        queries = (chunk.queries.stop - chunk.queries.start) // HEADS.group
        assert chunk.keys.stop - chunk.keys.start <= queries + 10 + LENGTH_MULTIPLE


def test_a_plan_lies_where_attention_computes() -> None:
    segments = segments_of([(5, [9, 8, 3]), (0, [4])])
    rows = rows_of(segments)
    like = torch.empty((), device="meta", dtype=torch.bfloat16)
    plan = plan_attention(segments, rows, HEADS, like, asking(rows, [1, 7, 9, 20]))
    tensors = [plan.outputs, plan.own_keys]
    for bucket in plan.buckets:
        tensors += [bucket.queries, bucket.keys, *(c.mask for c in bucket.chunks)]
        assert all(c.mask.dtype is torch.bfloat16 for c in bucket.chunks)
    assert {t.device.type for t in tensors} == {"meta"}
