"""Attention as one kernel: against a loop over queries in float64, for any layout, in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_layouts import Trees, asking, attention_by_loops, contexts, rows_of, segments_of, trees
from torch import Tensor

from twofold.functional.attention import Scoring, attention_backward, attention_forward
from twofold.functional.segments import AttentionPlan, Heads, plan_attention
from twofold.native.training import native_kernels, why_not

TYPES = [torch.float32, torch.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", TYPES, ids=["float32", "bfloat16"])
NONE = [why_not(d, torch.device("cpu")) for d in TYPES]
pytestmark = pytest.mark.skipif(any(NONE), reason=f"no kernels here: {NONE}")
FILLERS = 2


class Case:
    """A layout with random queries, keys, values and gradients of the output; the filler's are zero."""

    def __init__(
        self,
        layout: Trees,
        dtype: torch.dtype,
        heads: Heads,
        d: int,
        real: Sequence[int] | None = None,
        window: int | None = None,
    ) -> None:
        self.segments, self.window = segments_of(layout), window
        self.rows = rows_of(self.segments, FILLERS)
        queries = None if real is None else asking(self.rows, real, FILLERS)
        self.asked = torch.arange(self.rows) if queries is None else queries
        shapes = (len(self.asked), heads.queries, d), (self.rows, heads.keys, d), (self.rows, heads.keys, d)
        self.qkv = [torch.randn(*shape).to(dtype) for shape in shapes]
        self.do = torch.randn(shapes[0]).to(dtype)
        self.do[-FILLERS:] = 0
        self.plan: AttentionPlan = plan_attention(self.segments, self.rows, heads, self.qkv[0], queries, window)

    def by_loops(self, scoring: Scoring) -> list[Tensor]:
        """Output and gradients in float64, by autograd."""
        wide = [t.double().requires_grad_() for t in self.qkv]
        seen = contexts(self.segments, self.window)
        out = attention_by_loops(*wide, self.asked[:-FILLERS].tolist(), seen, scoring)  # type: ignore[arg-type]
        return [out.detach(), *torch.autograd.grad(out, wide, self.do[:-FILLERS].double())]

    def by_kernel(self, scoring: Scoring) -> list[Tensor]:
        with native_kernels():
            out, kept = attention_forward(*self.qkv, self.plan, scoring)  # type: ignore[call-arg]
            return [out[:-FILLERS], *attention_backward(self.do, *self.qkv, kept, self.plan, scoring)]  # type: ignore[call-arg]

    def agrees(self, scoring: Scoring) -> None:
        found, expected = self.by_kernel(scoring), self.by_loops(scoring)
        for ours, theirs in zip(found, expected, strict=True):
            bound = (
                3e-6 if ours.dtype == torch.float32 else 1.2e-2
            )  # of bfloat16: scores' gradients are rounded, then sums
            assert torch.isfinite(ours).all()
            assert float((ours.double() - theirs).abs().max()) <= bound * max(1.0, float(theirs.abs().max()))
        for gradient in found[1:]:
            assert not gradient[-FILLERS:].any()


@DTYPES
@pytest.mark.parametrize("d", [4, 16, 64, 80])
@pytest.mark.parametrize("heads", [Heads(2, 2), Heads(6, 2), Heads(3, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.usefixtures("only_kernels")
def test_output_and_gradients_are_those_of_a_loop_over_queries(
    dtype: torch.dtype, d: int, heads: Heads, window: int | None, cap: float | None
) -> None:
    layout = [(7, [20, 2, 18]), (0, [41, 1]), (33, [1, 4])]
    Case(layout, dtype, heads, d, window=window).agrees(Scoring(d**-0.5, cap))
    Case(layout, dtype, heads, d, [3, 6, 7, 30, 47, 48, 88, 122], window).agrees(Scoring(d**-0.5, cap))


@settings(deadline=None, max_examples=40)
@given(
    tree=trees,
    picks=st.sets(st.integers(0, 10**6), max_size=12),
    window=st.sampled_from([None, 1, 2, 7]),
    cap=st.sampled_from([None, 0.8]),
)
def test_any_layout_and_any_rows_that_ask(tree: Trees, picks: set[int], window: int | None, cap: float | None) -> None:
    every = sorted(contexts(segments_of(tree)))
    real = sorted({every[p % len(every)] for p in picks}) or None
    Case(tree, torch.float32, Heads(4, 2), 8, real, window).agrees(Scoring(0.6, cap))


@DTYPES
def test_a_long_segment_is_taken_in_parts_and_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    case = Case([(10, [430])], dtype, Heads(4, 1), 8)
    case.agrees(Scoring(0.35))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(case.by_kernel(Scoring(0.35)))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    case = Case([(0, [50])], torch.float32, Heads(2, 1), 8)
    case.qkv[0] *= 300
    found, expected = case.by_kernel(Scoring(1.0)), case.by_loops(Scoring(1.0))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


def test_a_backward_outside_goes_on_from_a_forward_inside() -> None:
    case = Case([(7, [20, 2])], torch.float32, Heads(4, 2), 16)
    scoring = Scoring(0.25)
    with native_kernels():
        _, kept = attention_forward(*case.qkv, case.plan, scoring)  # type: ignore[call-arg]
    gradients = attention_backward(case.do, *case.qkv, kept, case.plan, scoring)  # type: ignore[call-arg]
    for ours, theirs in zip(gradients, case.by_loops(scoring)[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@given(tree=trees, window=st.sampled_from([None, 1, 3]))
def test_the_keys_that_are_seen_are_counted(tree: Trees, window: int | None) -> None:
    segments = segments_of(tree)
    plan = plan_attention(segments, rows_of(segments), Heads(2, 1), torch.empty(0), window=window)
    assert plan.spans.keys_seen == sum(len(seen) for seen in contexts(segments, window).values())
