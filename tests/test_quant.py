"""Packed weights against bitsandbytes' own packing, against NF4 by brute force in float64, and products against dense ones."""

from __future__ import annotations

import itertools

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from twofold.lowrank.factors import LowRank
from twofold.lowrank.linear import Projection, group_product
from twofold.quant import SLICE, Scheme, quantise, roundtrip

NF4, PLAIN_NF4, INT8 = Scheme("nf4"), Scheme("nf4", double=False), Scheme("int8")
SCHEMES = pytest.mark.parametrize("scheme", [NF4, PLAIN_NF4, INT8], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SHAPES = pytest.mark.parametrize("shape", [(96, 48), (33, 21), (64, 128), (5, 5)])
"""Blocks of 64 end within rows, within the matrix and beyond it."""
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=torch.float64,
)
"""Of arXiv 2305.14314, appendix E."""


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(3)
    return (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)


def by_brute_force(w: Tensor) -> Tensor:
    """Each value replaced by the nearest of its block's 16 levels, block after block, in float64."""
    found = []
    for block in w.double().flatten().split(64):
        levels = LEVELS * block.abs().max()
        found.append(levels[(block[:, None] - levels).abs().argmin(1)])
    return torch.cat(found).view(w.shape)


@SHAPES
@DTYPES
def test_nf4_is_the_nearest_level_of_each_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = weight(shape, dtype)
    expected = by_brute_force(w)
    tolerance = torch.finfo(dtype).eps * w.abs().max().item()
    torch.testing.assert_close(roundtrip(w, PLAIN_NF4).double(), expected, rtol=0, atol=tolerance)


@SHAPES
def test_double_quantisation_moves_each_scale_by_little(shape: tuple[int, int]) -> None:
    """Its own scale is known to within a step of 8 bits of the largest: all values of a block move by the same factor."""
    w = weight(shape)
    scales = torch.stack([b.abs().max() for b in w.flatten().split(64)])
    spread = (scales - scales.mean()).abs().max().item()
    moved = (roundtrip(w, NF4) - roundtrip(w, PLAIN_NF4)).abs().max().item()
    assert moved <= 0.02 * spread + 1e-6
    assert len(scales) == 1 or moved > 0


@pytest.mark.parametrize("scheme", [NF4, PLAIN_NF4], ids=str)
@DTYPES
def test_the_bits_are_those_of_bitsandbytes(scheme: Scheme, dtype: torch.dtype) -> None:
    w = weight((64, 128), dtype)
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=scheme.double, quant_type="nf4")
    ours = quantise(w, scheme)
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.dequantised(), bnb.dequantize_4bit(packed, state))


def test_int8_rows_are_rounded_as_bitsandbytes_rounds_them() -> None:
    w = weight((32, 40)).half()
    codes, largest, _ = bnb.int8_vectorwise_quant(w)
    ours = quantise(w, INT8)
    assert torch.equal(ours.packed, codes)
    torch.testing.assert_close(ours.dequantised().float(), codes * largest[:, None] / 127, rtol=1e-3, atol=0)


@SCHEMES
def test_packing_in_slices_changes_nothing(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight((96, 48))
    whole = roundtrip(w, scheme)
    assert w.numel() < SLICE
    monkeypatch.setattr("twofold.quant.SLICE", 1024)
    assert torch.equal(roundtrip(w, scheme), whole)


@SCHEMES
def test_zeros_and_the_weight_itself_stay(scheme: Scheme) -> None:
    w = weight((64, 64))
    w[3:5] = 0
    before = w.clone()
    assert torch.equal(roundtrip(w, scheme)[3:5], torch.zeros(2, 64)) or scheme == NF4
    assert torch.equal(w, before)


@SCHEMES
@DTYPES
def test_products_are_those_of_the_unpacked_weight(scheme: Scheme, dtype: torch.dtype) -> None:
    packed = quantise(weight((96, 48), dtype), scheme)
    dense, bias = packed.dequantised(), torch.randn(96).to(dtype)
    assert dense.dtype == dtype
    x, dy = torch.randn(2, 7, 48).to(dtype), torch.randn(7, 96).to(dtype)
    assert torch.equal(packed.product(x, bias), torch.nn.functional.linear(x, dense, bias))
    assert torch.equal(packed.input_gradient(dy), dy @ dense)


@SCHEMES
def test_a_group_over_packed_weights_learns_what_one_over_dense_weights_learns(scheme: Scheme) -> None:
    torch.manual_seed(0)
    packed = [quantise(weight(s), scheme) for s in ((24, 48), (16, 48))]
    factors = [(torch.randn(3, 48), torch.randn(n, 3)) for n in (24, 16)]

    def gradients(weights: list[object]) -> list[Tensor]:
        learned = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in factors]
        x = torch.linspace(-1, 1, 5 * 48).view(5, 48).requires_grad_()
        ys = group_product(
            x, [Projection(w, None, LowRank(a, b, 0.5)) for w, (a, b) in zip(weights, learned, strict=True)]
        )
        sum((y**2).sum() for y in ys).backward()
        return [t.grad for t in (x, *itertools.chain(*learned))]

    for ours, dense in zip(gradients([*packed]), gradients([p.dequantised() for p in packed]), strict=True):
        torch.testing.assert_close(ours, dense)


def test_the_input_gradient_is_that_of_finite_differences() -> None:
    """In float64 over the fixed unpacked values; nothing of the packed weight itself learns."""
    packed = quantise(weight((12, 16)), NF4)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    update = LowRank(
        torch.randn(2, 16, dtype=torch.float64, requires_grad=True),
        torch.randn(12, 2, dtype=torch.float64, requires_grad=True),
        0.7,
    )

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return group_product(x, [Projection(packed, None, LowRank(a, b, 0.7))])[0]

    assert torch.autograd.gradcheck(product, (x, update.A, update.B))


def test_only_matrices_are_packed() -> None:
    with pytest.raises(ValueError, match="only matrices"):
        quantise(torch.ones(2, 3, 4), NF4)
