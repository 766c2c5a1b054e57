"""The memory-optimal product against autograd of the formula as one would write it first, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twofold.lowrank.factors import LowRank, merged_weight, scale_of
from twofold.lowrank.linear import Group, Kept, Projection, drop, group_backward, group_forward, group_product

IN = 5


def member(
    out: int, r: int | None, *, bias: bool, scale: float = 0.7, dtype: torch.dtype = torch.float64
) -> Projection:
    update = None
    if r is not None:
        A, B = torch.randn(r, IN, dtype=dtype), torch.randn(out, r, dtype=dtype)
        update = LowRank(A.requires_grad_(), B.requires_grad_(), scale)
    return Projection(torch.randn(out, IN, dtype=dtype), torch.randn(out, dtype=dtype) if bias else None, update)


GROUPS = {
    "one": [(4, 2, False)],
    "one with bias": [(4, 2, True)],
    "q k v": [(6, 3, True), (4, 1, False), (4, 2, True)],
    "some not adapted": [(6, None, True), (4, 2, False), (3, None, False), (2, 4, True)],
    "none adapted": [(6, None, True), (4, None, False)],
    "rank above both sides": [(2, 9, False)],
    "learned biases": [(4, 2, True), (3, None, True), (2, 1, False)],
    "stretched": [(6, 3, True), (4, None, True), (4, 2, False)],
    "stretched with learned biases": [(4, 2, True), (2, 1, False)],
    "frozen A": [(6, 3, True), (4, 1, False)],
    "frozen A, stretched": [(6, 3, False), (4, 1, True)],
    "some A frozen": [(6, 3, True), (4, 1, False), (3, 2, False)],
    "frozen update": [(6, 3, True), (4, 1, False)],
}


def group_of(name: str) -> list[Projection]:
    group = [member(out, r, bias=bias, scale=0.5 + i) for i, (out, r, bias) in enumerate(GROUPS[name])]
    if "learned" in name:
        for bias in (p.bias for p in group if p.bias is not None):
            bias.requires_grad_()
    for p in group[: 2 if "some" in name else None]:
        if "frozen" in name and p.update is not None:
            p.update.A.requires_grad_(False)
            p.update.B.requires_grad_("update" not in name)
    if "stretched" in name:
        stretches = [None if p.update is None else torch.randn(len(p.weight), dtype=torch.float64) for p in group]
        group = [
            p._replace(stretch=None if s is None else s.requires_grad_()) for p, s in zip(group, stretches, strict=True)
        ]
    return group


def with_learned(group: Sequence[Projection], learned: Sequence[Tensor]) -> list[Projection]:
    """The projections with other tensors in place of the learned ones, in their order."""
    given = iter(learned)

    def other(t: Tensor) -> Tensor:
        return next(given) if t.requires_grad else t

    return [
        p._replace(
            update=p.update and LowRank(other(p.update.A), other(p.update.B), p.update.scale),
            bias=None if p.bias is None else other(p.bias),
            stretch=None if p.stretch is None else other(p.stretch),
        )
        for p in group
    ]


def learned_of(group: Sequence[Projection]) -> list[Tensor]:
    return [t for p in group for t in p.learned()]


def naive(x: Tensor, group: Sequence[Projection], mask: Tensor | None = None, keep: float = 1.0) -> list[Tensor]:
    """The formula, with the full low-rank outputs that the real one avoids."""
    dropped = x if mask is None else x * mask / keep
    outputs = []
    for weight, bias, update, _, stretch in group:
        y = x @ weight.T
        if update is not None:
            y = y + update.scale * (dropped @ update.A.T @ update.B.T)
        if stretch is not None:
            y = y * stretch
        if bias is not None:
            y = y + bias
        outputs.append(y)
    return outputs


@pytest.mark.parametrize("name", GROUPS)
def test_gradcheck(name: str) -> None:
    group = group_of(name)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        return group_product(x, with_learned(group, learned))

    assert torch.autograd.gradcheck(run, (x, *learned_of(group)))


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_outputs_and_gradients_are_those_of_the_formula(name: str, dropout: float) -> None:
    """The dropout mask is drawn by the product itself: the same seed draws it here again."""
    group, x = group_of(name), torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(9)
    found = group_product(x, group, dropout)
    torch.manual_seed(9)
    kept = drop(x.reshape(-1, IN), dropout)
    mask = None if kept is None else kept.mask.view(x.shape)
    expected = naive(x, group, mask, 1 - dropout)
    weights = [torch.randn_like(y) for y in expected]
    inputs = [x, *learned_of(group)]
    back = torch.autograd.grad(sum((y * w).sum() for y, w in zip(found, weights, strict=True)), inputs)
    right = torch.autograd.grad(sum((y * w).sum() for y, w in zip(expected, weights, strict=True)), inputs)
    for a, b in zip([*found, *back], [*expected, *right], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_plain_functions_agree_with_autograd_under_a_given_mask(name: str) -> None:
    """`group_forward` and `group_backward` as those call them who cannot use the autograd engine."""
    group, x = group_of(name), torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
    kept = Kept(torch.rand(7, IN) < 0.6, 0.6)
    expected = naive(x, group, kept.mask, 0.6)
    weights = [torch.randn_like(y) for y in expected]
    inputs = [x, *learned_of(group)]
    right = torch.autograd.grad(sum((y * w).sum() for y, w in zip(expected, weights, strict=True)), inputs)
    with torch.no_grad():
        inside = Group.of(group, torch.float64)
        outputs, h = group_forward(x, kept, inside)
        dx, found = group_backward(weights, x, kept, h, inside, input_gradient=True)
    assert inside.learns == bool(found)
    for a, b in zip([*outputs, dx, *found], [*expected, *right], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_parts_of_a_group_together_are_the_group(name: str) -> None:
    """With rows of its own for the first member, as the last layer's q has them."""
    group, x = group_of(name), torch.randn(7, IN, dtype=torch.float64)
    kept = Kept(torch.rand(7, IN) < 0.6, 0.6)
    with torch.no_grad():
        whole = Group.of(group, torch.float64, dropout=0.4)
        outputs, h = group_forward(x, kept, whole)
        weights = [torch.randn_like(y) for y in outputs]
        dx, learned = group_backward(weights, x, kept, h, whole, input_gradient=True)
        assert dx is not None
        sum_dx, in_parts = torch.zeros_like(dx), []
        for at in (slice(0, 1), slice(1, len(group))):
            if not group[at]:
                continue
            part = whole.part(at)
            some, h_part = group_forward(x, kept, part)
            for a, b in zip(some, outputs[at], strict=True):
                torch.testing.assert_close(a, b)
            part_dx, of_part = group_backward(weights[at], x, kept, h_part, part, input_gradient=True)
            assert part_dx is not None
            assert part.dropout == (whole.dropout if part.A is not None else 0.0)
            sum_dx += part_dx
            in_parts += of_part
    for a, b in zip([sum_dx, *in_parts], [dx, *learned], strict=True):
        torch.testing.assert_close(a, b)


def test_factors_cast_before_are_the_ones_multiplied() -> None:
    plain = group_of("q k v")
    cast = [
        p._replace(cast=(p.update.A.detach() * 2, p.update.B.detach())) if p.update is not None else p for p in plain
    ]
    doubled = [p._replace(update=p.update and LowRank(p.update.A * 2, p.update.B, p.update.scale)) for p in plain]
    x = torch.randn(3, IN, dtype=torch.float64)
    for a, b in zip(group_product(x, cast), naive(x, doubled), strict=True):
        torch.testing.assert_close(a, b)


def test_no_input_gradient_is_formed_where_none_is_asked_for() -> None:
    group, x = group_of("one"), torch.randn(3, IN, dtype=torch.float64)
    inside = Group.of(group, torch.float64)
    with torch.no_grad():
        outputs, h = group_forward(x, None, inside)
        assert group_backward(outputs, x, None, h, inside, input_gradient=False)[0] is None
    (y,) = group_product(x, group)
    y.sum().backward()
    assert x.grad is None


def test_a_member_that_nothing_depends_on_gets_no_gradient() -> None:
    group, x = group_of("q k v"), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    group_product(x, group)[1].sum().backward()
    for i, p in enumerate(group):
        assert p.update is not None
        assert p.update.B.grad is not None
        assert bool(p.update.B.grad.any()) == (i == 1)


def test_dropout_keeps_the_expected_share_and_its_mean() -> None:
    x = torch.ones(400, 50)
    kept = drop(x, 0.3)
    assert kept is not None
    assert kept.mask.float().mean() == pytest.approx(0.7, abs=0.02)
    assert kept.apply(x).mean() == pytest.approx(1.0, abs=0.03)
    assert drop(x, 0.0) is None


def test_bfloat16_stays_near_float64_and_gradients_return_in_the_factors_type() -> None:
    torch.manual_seed(1)
    exact = [member(24, 4, bias=True, scale=2.0, dtype=torch.float64), member(8, None, bias=False)]
    x = torch.randn(16, IN, dtype=torch.float64, requires_grad=True)
    y = torch.cat(group_product(x, exact), 1)
    y.square().sum().backward()
    update = exact[0].update
    assert update is not None
    A, B = (f.detach().float().requires_grad_() for f in (update.A, update.B))
    rough = [
        Projection(exact[0].weight.bfloat16(), exact[0].bias.bfloat16(), LowRank(A, B, 2.0)),  # type: ignore[union-attr]
        Projection(exact[1].weight.bfloat16(), None, None),
    ]
    low = x.detach().bfloat16().requires_grad_()
    z = torch.cat(group_product(low, rough), 1)
    z.float().square().sum().backward()
    assert z.dtype is torch.bfloat16
    for found, right in ((z, y), (low.grad, x.grad), (A.grad, update.A.grad), (B.grad, update.B.grad)):
        assert found is not None
        assert right is not None
        assert (found.double() - right).norm() < 0.03 * right.norm()
    assert A.grad is not None
    assert A.grad.dtype is torch.float32


def kept_shapes(x: Tensor, group: Sequence[Projection]) -> dict[tuple[int, ...], int]:
    """Times that each shape is kept for the backward, each storage counted once."""
    seen: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        group_product(x, group)
    shapes = list(seen.values())
    return {shape: shapes.count(shape) for shape in set(shapes)}


def test_nothing_is_kept_but_the_input_once_and_the_bottleneck() -> None:
    rows, out, r = 40, 96, 3
    group = [
        Projection(
            torch.randn(out, 64), None, LowRank(torch.randn(r, 64, requires_grad=True), torch.randn(out, r), 1.0)
        )
        for _ in range(3)
    ]
    x = torch.randn(rows, 64, requires_grad=True)
    assert kept_shapes(x, group) == {(rows, 64): 1, (rows, 3 * r): 1}


def test_a_frozen_a_keeps_no_input_and_gets_no_product() -> None:
    """LoRA-FA: of two members, x is kept for neither."""
    rows, out, r = 40, 96, 3
    updates = [LowRank(torch.randn(r, 64), torch.randn(out, r, requires_grad=True), 1.0) for _ in range(2)]
    x = torch.randn(rows, 64, requires_grad=True)
    assert kept_shapes(x, [Projection(torch.randn(out, 64), None, u) for u in updates]) == {(rows, 2 * r): 1}


def test_neither_delta_nor_full_outputs_are_alive_between_forward_and_backward() -> None:
    """Counted on the process's live tensors: outputs, x, h and factors, and nothing else of their size."""
    import gc

    rows, features = 37, 83
    A, B = torch.randn(2, features, requires_grad=True), torch.randn(features, 2, requires_grad=True)
    weight, x = torch.randn(features, features), torch.randn(rows, features, requires_grad=True)
    (y,) = group_product(x, [Projection(weight, None, LowRank(A, B, 1.0))])
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is Tensor and t.shape in ((rows, features), (features, features))]
    assert {t.data_ptr() for t in alive} <= {x.data_ptr(), y.data_ptr(), weight.data_ptr()}


# ---------------------------------------------------------------------------------------- factors


@given(
    out=st.integers(1, 6), inner=st.integers(1, 6), r=st.integers(1, 8), scale=st.floats(-3, 3), seed=st.integers(0, 99)
)
def test_the_delta_is_the_scaled_product(out: int, inner: int, r: int, scale: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((r, inner), (out, r)))
    update = LowRank(A, B, scale)
    torch.testing.assert_close(update.delta(), scale * torch.einsum("or,ri->oi", B, A))
    assert update.rank == r


def test_a_merged_weight_is_rounded_once_and_is_new() -> None:
    """Adding deltas one by one in bfloat16 loses what is below half a unit; their sum does not."""
    weight = torch.ones(3, 3, dtype=torch.bfloat16)
    small = torch.full((3, 3), 0.003)
    merged = merged_weight(weight, [small] * 4)
    assert merged.dtype is torch.bfloat16
    assert torch.equal(merged, torch.full((3, 3), 1.012).bfloat16())
    assert not torch.equal(merged, weight)
    assert torch.equal(weight, torch.ones(3, 3, dtype=torch.bfloat16))
    alone = merged_weight(torch.ones(2, 2), [])
    assert torch.equal(alone, torch.ones(2, 2))


def test_scale() -> None:
    assert scale_of(16.0, 4, rank_stabilised=False) == 4.0
    assert scale_of(16.0, 4, rank_stabilised=True) == 8.0
