"""Our own kernels against the same formulas in float64."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from twofold.functional.attention import Scoring, cached_attention
from twofold.functional.gated import ACTIVATIONS
from twofold.functional.norm import Norm
from twofold.functional.rope import Angles, rotate
from twofold.native import build, kernels
from twofold.native.build import NotBuilt
from twofold.native.kernels import SEGMENT, Kernels, Updates
from twofold.native.packed import Packed
from twofold.quant import Int8Weight, Scheme, quantise

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of a sum in float32, and of the result."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=scale * (3e-6 if dtype == torch.float32 else 8e-3)
    )


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 12, 13, 40])
@pytest.mark.parametrize(("out", "in_"), [(64, 32), (40, 64), (17, 16), (200, 48)])
def test_a_product_is_that_of_the_matrix(dtype: torch.dtype, rows: int, out: int, in_: int) -> None:
    w, x, bias, onto = (torch.randn(*s).to(dtype) for s in ((out, in_), (rows, in_), (out,), (rows, out)))
    run, packed = Kernels(dtype).linear, Packed(w)
    expected = x.double() @ w.double().T
    near(run(x, packed), expected, dtype)
    near(run(x, packed, bias), expected + bias.double(), dtype)
    near(run(x, packed, None, onto.clone()), expected + onto.double(), dtype)


def test_a_row_has_the_same_bits_whatever_batch_it_is_in() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(33, 96).to(dtype), Packed(torch.randn(80, 96).to(dtype))
        run = Kernels(dtype).linear
        whole = run(x, w)
        for rows in (1, 3, 8, 12, 20):
            assert torch.equal(run(x[:rows].contiguous(), w), whole[:rows])


@DTYPES
@pytest.mark.parametrize(("out", "in_"), [(64, 32), (40, 64), (17, 16), (200, 48)])
def test_a_product_in_eight_bits_is_that_of_the_codes(dtype: torch.dtype, out: int, in_: int) -> None:
    whole = quantise(torch.randn(out, in_).to(dtype), Scheme("int8"))
    assert isinstance(whole, Int8Weight)
    w, bias = whole.packed.double() * whole.row_scale.double()[:, None], torch.randn(out).to(dtype)
    run, packed = Kernels(dtype).linear, Packed(whole)
    for rows in (1, 2, 5, 6, 7, 12, 13, 40):
        x, onto = torch.randn(rows, in_).to(dtype), torch.randn(rows, out).to(dtype)
        near(run(x, packed), x.double() @ w.T, dtype)
        near(run(x, packed, bias, onto.clone()), x.double() @ w.T + bias.double() + onto.double(), dtype)
        assert torch.equal(run(x[:1], packed), run(x, packed)[:1])


@DTYPES
def test_what_was_packed_comes_back_as_it_was(dtype: torch.dtype) -> None:
    for out, in_ in ((64, 32), (17, 16), (33, 48)):
        matrix, rows = torch.randn(out, in_).to(dtype), torch.randperm(out)
        codes = quantise(matrix, Scheme("int8"))
        assert torch.equal(Packed(matrix).rows(rows), matrix[rows])
        assert isinstance(codes, Int8Weight)
        assert torch.equal(Packed(codes).codes(rows), codes.packed[rows])
        assert torch.equal(Packed(codes).rows(rows), codes.dequantised()[rows])


def _segment(group: list[tuple[Tensor, Tensor, float] | None], ranks: int, kept: list[Packed]) -> Any:
    """One adapter's factors as the kernels read them, written out by hand."""
    one = np.zeros((), SEGMENT)
    in_ = next(g[0].shape[1] for g in group if g)
    dtype = next(g[0].dtype for g in group if g)
    A = torch.zeros(len(group) * ranks, in_, dtype=dtype)
    for m, found in enumerate(group):
        if found:
            A[m * ranks : m * ranks + len(found[0])] = found[0]
            B = torch.zeros(len(found[1]), ranks, dtype=dtype)
            B[:, : found[1].shape[1]] = found[1]
            kept.append(Packed(B))
            one["b"][m], one["scale"][m] = kept[-1].address, found[2]
    kept.append(Packed(A))
    one["ranks"], one["a"] = ranks, kept[-1].address
    return one


@DTYPES
def test_each_row_gets_its_own_adapters(dtype: torch.dtype) -> None:
    """Unequal ranks and scales, a projection left out, an adapter of nothing here, rows with two adapters and with none."""
    widths, in_, rows = (48, 24, 40), 32, 15
    w, x = torch.randn(sum(widths), in_).to(dtype), torch.randn(rows, in_).to(dtype)
    group: list[list[tuple[Tensor, Tensor, float] | None]] = [
        [(torch.randn(r, in_).to(dtype), torch.randn(n, r).to(dtype), 0.1 * r) for n in widths] for r in (3, 16, 20)
    ]
    group[1][1] = None
    kept: list[Packed] = []
    segments = np.array(
        [
            _segment(group[0], 16, kept),
            _segment(group[1], 16, kept),
            _segment(group[2], 32, kept),
            np.zeros((), SEGMENT),
        ]
    )
    of_rows = [[0, 3, 4, 14], [3], [1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0], [2]]
    weights = [[1.0, 0.5, -1.0, 1.0], [2.0], [1.0] * 12 + [0.25], [1.0]]
    updates = Updates(
        np.cumsum([0, *map(len, of_rows)]).astype(np.int32),
        np.array([row for chosen in of_rows for row in chosen], np.int32),
        np.array([weight for much in weights for weight in much], np.float32),
    )
    found = Kernels(dtype).linear(x, Packed(w), None, None, (updates, segments, np.array(widths, np.int64)))
    expected = x.double() @ w.double().T
    for members, chosen, much in zip(group, of_rows, weights, strict=False):
        for row, weight in zip(chosen, much, strict=True):
            parts = [
                torch.zeros(n).double()
                if g is None
                else weight * g[2] * (g[1].double() @ (g[0].double() @ x[row].double()))
                for g, n in zip(members, widths, strict=True)
            ]
            expected[row] += torch.cat(parts)
    near(found, expected, dtype)


@DTYPES
def test_norms_and_gates(dtype: torch.dtype) -> None:
    run, x, weight = Kernels(dtype), (3 * torch.randn(9, 48)).to(dtype), torch.randn(48)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    near(run.rms_norm(x, Norm(weight, 1e-5)), expected, dtype)
    both = (4 * torch.randn(7, 96)).to(dtype)
    both[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -90.0])
    for name, number in kernels.ACTIVATIONS.items():
        gate, up = both.double().chunk(2, -1)
        near(run.gated(both, number), ACTIVATIONS[name].forward(gate) * up, dtype)


@DTYPES
@pytest.mark.parametrize("turned", [16, 32])
def test_queries_and_keys_are_normed_and_turned_and_kept(dtype: torch.dtype, turned: int) -> None:
    d, rows, heads = 32, 5, np.array([4, 2, 32, turned], np.int64)
    qkv, angle = torch.randn(rows, 8 * d).to(dtype), torch.randn(rows, turned // 2)
    angles = Angles.of(*(f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin)))
    keys, values = torch.zeros(3, 2, 6, d, dtype=dtype), torch.zeros(3, 2, 6, d, dtype=dtype)
    slots, positions = (
        torch.tensor([2, 0, 0, 1, 2], dtype=torch.int32),
        torch.tensor([5, 0, 1, 3, 4], dtype=torch.int32),
    )
    norms = (Norm(torch.rand(d) + 1, 1e-6), Norm(torch.rand(d) + 1, 1e-6))
    wide = qkv.double().unflatten(-1, (8, d))
    exact = Angles(angles.cos.double(), angles.sin.double())
    for chosen in ((None, None), norms):
        turning, kept = qkv.clone(), wide.clone()
        Kernels(dtype).rotary(turning, heads, angles, chosen, (slots, positions), keys, values)
        for part, norm in zip((slice(0, 4), slice(4, 6)), chosen, strict=True):
            if norm is not None:
                kept[:, part] /= (kept[:, part].square().mean(-1, keepdim=True) + 1e-6).sqrt()
                kept[:, part] *= norm.weight.double()
        expected = torch.cat([rotate(kept[:, :6], exact), kept[:, 6:]], 1)
        near(turning.unflatten(-1, (8, d)), expected, dtype)
        at = (slots.long(), slice(None), positions.long())
        near(keys[at], expected[:, 4:6], dtype)
        near(values[at], expected[:, 6:], dtype)


@DTYPES
@pytest.mark.parametrize(("d", "heads", "kv"), [(64, 9, 3), (16, 4, 4), (80, 6, 1), (256, 2, 1)])
def test_attention_is_that_of_batched_products(dtype: torch.dtype, d: int, heads: int, kv: int) -> None:
    keys, values = (torch.randn(4, kv, 70, d).to(dtype) for _ in range(2))
    qkv = torch.randn(5, (heads + 2 * kv) * d).to(dtype)
    slots, positions = (
        torch.tensor([3, 0, 1, 1, 2], dtype=torch.int32),
        torch.tensor([0, 69, 15, 16, 40], dtype=torch.int32),
    )
    for window, softcap in ((None, None), (7, None), (None, 3.0)):
        scoring = Scoring(d**-0.5, softcap)
        found = Kernels(dtype).attention(
            qkv, np.array([heads, kv, d, d]), (slots, positions), keys, values, scoring, window, 5
        )
        q = qkv.double()[:, : heads * d].view(5, 1, heads, d)
        at = slots.long()
        expected = cached_attention(
            q, keys[at].double(), values[at].double(), positions[:, None].long(), scoring, window
        )
        near(found, expected.view(5, -1), dtype)


@DTYPES
@pytest.mark.parametrize(("d", "heads", "kv"), [(64, 9, 3), (16, 4, 4), (80, 6, 1), (256, 2, 1)])
@pytest.mark.parametrize(("few", "counts"), [(0, [1]), (2, [1, 1, 17, 40]), (0, [130, 3]), (1, [5, 16, 33])], ids=str)
def test_parts_of_prompts_see_what_their_rows_see(
    dtype: torch.dtype, d: int, heads: int, kv: int, few: int, counts: list[int]
) -> None:
    """A row of a part, whose slot is laid out once for all of them, against a row on its own."""
    keys, values = (torch.randn(4, kv, 200, d).to(dtype) for _ in range(2))
    starts = [60, 3, 0, 25][: len(counts)]
    slots = torch.tensor([s for s, n in zip((2, 0, 3, 1), counts, strict=False) for _ in range(n)], dtype=torch.int32)
    positions = torch.tensor([s + i for s, n in zip(starts, counts, strict=True) for i in range(n)], dtype=torch.int32)
    qkv = torch.randn(len(slots), (heads + 2 * kv) * d).to(dtype)
    for window, softcap in ((None, None), (9, None), (None, 3.0)):
        scoring, sizes = Scoring(d**-0.5, softcap), np.array([heads, kv, d, d])
        found = Kernels(dtype).attention(qkv, sizes, (slots, positions), keys, values, scoring, window, few)
        q, at = qkv.double()[:, : heads * d].view(-1, 1, heads, d), slots.long()
        expected = cached_attention(
            q, keys[at].double(), values[at].double(), positions[:, None].long(), scoring, window
        )
        near(found, expected.view(len(slots), -1), dtype)


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    build.library.cache_clear()
    try:
        monkeypatch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(NotBuilt, match="no C\\+\\+ compiler"):
            build.library()
        monkeypatch.setenv("TWOFOLD_NATIVE", "0")
        with pytest.raises(NotBuilt, match="TWOFOLD_NATIVE=0"):
            build.library()
    finally:
        build.library.cache_clear()
