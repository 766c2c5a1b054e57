"""Packed and cached attention: against a loop over queries in float64, with nothing seen across borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_layouts import Trees, asking, attention_by_loops, contexts, rows_of, segments_of, trees
from torch import Tensor

from twofold.functional import attention
from twofold.functional import segments as segments_module
from twofold.functional.attention import Scoring, attention_backward, attention_forward, cached_attention
from twofold.functional.segments import AttentionPlan, Heads, Segment, plan_attention

D = 4
LAYOUTS: dict[str, Trees] = {
    "one token": [(0, [1])],
    "one": [(0, [5])],
    "several buckets": [(0, [1, 20, 19, 3, 40])],
    "a shared prefix": [(6, [3, 5, 5])],
    "prefixes of other buckets": [(7, [20, 2, 18]), (0, [9, 1]), (1, [4, 4]), (3, [1])],
}
HEADS = [(2, 2), (4, 2), (3, 1)]
SCORINGS = {"plain": Scoring(0.6), "capped": Scoring(0.6, 1.5)}
WAYS = ["kept", "computed again", "in chunks", "in chunks, computed again"]


def attend_by(way: str, patch: pytest.MonkeyPatch) -> None:
    """Keep the probabilities or compute them again; all queries at once, or four at a time and in more buckets."""
    if "again" in way:
        patch.setattr(attention, "KEEP_UP_TO", 0)
    if "chunks" in way:
        patch.setattr(segments_module, "CHUNK_SCORES", 1)
        patch.setattr(segments_module, "CHUNK_MULTIPLE", 4)
        patch.setattr(segments_module, "SHORT", 0)


class _Attention(torch.autograd.Function):
    """The two plain functions as one node."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scoring: Scoring) -> Tensor:
        out, ctx.kept = attention_forward(q, k, v, plan, scoring)
        ctx.save_for_backward(q, k, v)
        ctx.rest = plan, scoring
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return *attention_backward(gradients[0], *ctx.saved_tensors, ctx.kept, *ctx.rest), None, None


@dataclass(frozen=True)
class Batch:
    """A layout, and who asks: all rows, or the given ones; filler last."""

    segments: list[Segment]
    real: Sequence[int] | None = None
    window: int | None = None
    scoring: Scoring = SCORINGS["plain"]
    fillers: int = 2

    @property
    def rows(self) -> int:
        return rows_of(self.segments, self.fillers)

    @property
    def asked(self) -> Tensor:
        return torch.arange(self.rows) if self.real is None else asking(self.rows, self.real, self.fillers)

    @property
    def answers(self) -> int:
        """Queries that are no filler."""
        return len(self.asked) - self.fillers

    def qkv(self, heads: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
        shapes = ((len(self.asked), heads[0]), (self.rows, heads[1]), (self.rows, heads[1]))
        return [torch.randn(*s, D, dtype=dtype, requires_grad=True) for s in shapes]

    def packed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is under test; the filler's answers dropped."""
        heads, queries = Heads(q.shape[1], k.shape[1]), None if self.real is None else self.asked
        plan = plan_attention(self.segments, self.rows, heads, q, queries, self.window)
        found: Tensor = _Attention.apply(q, k, v, plan, self.scoring)
        assert found.shape == q.shape
        return found[: self.answers]

    def by_loops(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One query and head at a time."""
        asked = self.asked[: self.answers].tolist()
        return attention_by_loops(q, k, v, asked, contexts(self.segments, self.window), self.scoring)


def agree(batch: Batch, heads: tuple[int, int]) -> None:
    """Outputs and gradients of a random weighting of them; the filler's gradient is exactly zero."""
    tensors = batch.qkv(heads)
    found, expected = batch.packed(*tensors), batch.by_loops(*tensors)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weights).sum(), tensors)
    theirs = torch.autograd.grad((expected * weights).sum(), tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        assert not a[-batch.fillers :].any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_packed_attention_is_that_of_a_loop_over_queries(
    way: str, scoring: str, window: int | None, layout: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    attend_by(way, monkeypatch)
    agree(Batch(segments_of(LAYOUTS[layout]), window=window, scoring=SCORINGS[scoring]), heads)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "real",
    [[0], [6, 7, 11], [2, 5, 8, 9, 16], [18], [5, 18]],
    ids=["prefix alone", "one, whole", "prefix and some", "one not continued", "prefix's end and another"],
)
def test_only_the_rows_that_ask_are_answered(
    way: str, window: int | None, real: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last layer does; the prefix itself may ask or not, and segments may be asked for nothing at all."""
    attend_by(way, monkeypatch)
    agree(Batch(segments_of([(6, [5, 6]), (0, [3, 1])]), real, window), (4, 2))


@given(
    tree=trees,
    picks=st.sets(st.integers(0, 10**6), max_size=12),
    window=st.sampled_from([None, 1, 2, 7]),
    softcap=st.sampled_from([None, 0.8]),
    way=st.sampled_from(WAYS),
    fillers=st.integers(1, 4),
)
def test_any_layout_and_any_rows_that_ask(
    tree: Trees, picks: set[int], window: int | None, softcap: float | None, way: str, fillers: int
) -> None:
    segments = segments_of(tree)
    every = sorted(contexts(segments))
    real = sorted({every[p % len(every)] for p in picks}) or None
    with pytest.MonkeyPatch.context() as patch:
        attend_by(way, patch)
        agree(Batch(segments, real, window, Scoring(0.6, softcap), fillers), (4, 2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_gradcheck(way: str, scoring: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    attend_by(way, monkeypatch)
    batch = Batch(segments_of([(3, [2, 1]), (0, [4])]), [1, 3, 4, 8, 9], window=4, scoring=SCORINGS[scoring])
    assert torch.autograd.gradcheck(batch.packed, batch.qkv(heads), fast_mode=True)


@pytest.mark.parametrize("way", WAYS)
def test_probabilities_are_kept_only_where_few_keys_are_seen(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend_by(way, monkeypatch)
    batch = Batch(segments_of([(0, [30, 9])]))
    q, k, v = batch.qkv((4, 2))
    plan = plan_attention(batch.segments, batch.rows, Heads(4, 2), q)
    kept = attention_forward(q, k, v, plan, batch.scoring)[1]
    chunks = [c for b in plan.buckets for c in b.chunks]
    assert len(kept) == len(chunks)
    for p, chunk in zip(kept, chunks, strict=True):
        assert (p is None) == ("again" in way)
        if p is not None:
            assert p.shape[1:] == (chunk.queries.stop - chunk.queries.start, chunk.keys.stop - chunk.keys.start)
            torch.testing.assert_close(p.sum(-1), torch.ones_like(p.sum(-1)))


def runs(batch: Batch, tensors: list[Tensor], changed: slice, into: float) -> list[list[Tensor]]:
    """Outputs and gradients outside `changed`, as they are and with other numbers in there."""
    others = [t.detach().clone() for t in tensors]
    for t in others:
        t[changed] = into
        t.requires_grad_()
    found = []
    for run in (tensors, others):
        y = batch.packed(*run)
        keep = torch.ones(batch.rows, dtype=torch.bool)
        keep[changed] = False
        keep[-batch.fillers :] = False
        grads = torch.autograd.grad(y[keep[: len(y)]].square().sum(), run)
        found.append([y[keep[: len(y)]], *(g[keep] for g in grads)])
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_no_example_sees_another(way: str, changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other numbers in one example, even infinite ones, leave the others' outputs and gradients as they are, to the bit."""
    attend_by(way, monkeypatch)
    batch = Batch(segments_of([(0, [6, 5, 7, 2])]))
    s = batch.segments[changed]
    tensors = batch.qkv((4, 2), torch.float32)
    for a, b in zip(*runs(batch, tensors, slice(s.start, s.start + s.length), float("inf")), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("changed", [1, 2, 3])
def test_no_continuation_of_a_prefix_sees_another(way: str, changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in its outputs nor in its own gradients; those of the prefix come from all that continue it."""
    attend_by(way, monkeypatch)
    batch = Batch(segments_of([(6, [5, 7, 5])]))
    s = batch.segments[changed]
    found, other = runs(batch, batch.qkv((4, 2), torch.float32), slice(s.start, s.start + s.length), float("inf"))
    assert torch.equal(found[0], other[0])
    assert torch.equal(found[1], other[1])
    for a, b in zip(found[2:], other[2:], strict=True):
        assert torch.equal(a[6:], b[6:])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [None, 4])
def test_no_query_sees_the_future(way: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    attend_by(way, monkeypatch)
    batch = Batch(segments_of([(3, [6, 6])]), window=window)
    tensors = batch.qkv((2, 2), torch.float32)
    later = [t.detach().clone() for t in tensors]
    for t in later[1:]:
        t[7:9] = 100.0
    first, second = batch.packed(*tensors), batch.packed(*later)
    assert torch.equal(first[:7], second[:7])
    assert torch.equal(first[9:], second[9:])
    assert not torch.equal(first[7:9], second[7:9])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_bfloat16_stays_near_the_truth(way: str, scoring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend_by(way, monkeypatch)
    batch = Batch(segments_of([(0, [12, 3]), (5, [9, 8])]), scoring=SCORINGS[scoring])
    low = [t.detach().bfloat16().requires_grad_() for t in batch.qkv((4, 2))]
    wide = [t.detach().double().requires_grad_() for t in low]
    found, expected = batch.packed(*low), batch.by_loops(*wide)
    assert found.dtype is torch.bfloat16
    ours = torch.autograd.grad(found.float().square().sum(), low)
    theirs = torch.autograd.grad(expected.square().sum(), wide)
    for a, b in zip([found, *ours], [expected, *theirs], strict=True):
        assert (a.double() - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_cached_attention_is_the_tail_of_the_whole(
    heads: tuple[int, int], new: int, window: int | None, scoring: str
) -> None:
    """Streams of different age over one cache; places behind a stream's own position hold rubbish."""
    ages = [7, 4]
    keys, values = (torch.full((2, heads[1], 9, D), 1e4, dtype=torch.float64) for _ in range(2))
    queries, expected = [], []
    for i, age in enumerate(ages):
        batch = Batch([Segment(0, age)], window=window, scoring=SCORINGS[scoring])
        q, k, v = (t.detach()[:age] for t in batch.qkv(heads))
        keys[i, :, :age], values[i, :, :age] = k.transpose(0, 1), v.transpose(0, 1)
        queries.append(q[-new:])
        expected.append(batch.by_loops(q, k, v)[-new:])
    positions = torch.stack([torch.arange(age - new, age) for age in ages])
    found = cached_attention(torch.stack(queries), keys, values, positions, SCORINGS[scoring], window)
    torch.testing.assert_close(found, torch.stack(expected))
