"""Intruders without a decomposition, against dense ones, over weights whose spectra are of several kinds."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from twofold.lowrank.beside import Weight
from twofold.lowrank.factors import LowRank
from twofold.lowrank.intruders import ALIKE, intruders, intruders_exactly
from twofold.machine import multiplied_in
from twofold.native.training import native_kernels

SPECTRA = {
    "power": lambda i: (i + 1) ** -0.7,
    "slow": lambda i: (i + 20) ** -0.5,
    "flat with a head": lambda i: torch.where(i < 6, 4 - i / 2, 1 - i / 600),
    "rank-deficient": lambda i: torch.where(i < 150, (i + 1) ** -0.5, 0.0),
}


def weight(spectrum: str, out: int, in_: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(out)
    u, v = (torch.linalg.qr(torch.randn(n, min(out, in_), generator=generator)).Q for n in (out, in_))
    return (u * SPECTRA[spectrum](torch.arange(min(out, in_)).float())) @ v.T.to(torch.float32).to(dtype).float()


def update(out: int, in_: int, sizes: list[float]) -> LowRank:
    """Random directions of these sizes."""
    generator = torch.Generator().manual_seed(5)
    u, v = (torch.linalg.qr(torch.randn(n, len(sizes), generator=generator)).Q for n in (out, in_))
    return LowRank(v.T.contiguous(), u * torch.tensor(sizes) / 2, 2.0)


@pytest.mark.parametrize("kernels", [native_kernels, nullcontext], ids=["ours", "PyTorch's"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[0.01] * 4, [0.3, 0.2, 0.1], [5.0, 0.5, 0.4], [0.7] * 6], ids=str)
@pytest.mark.parametrize("shape", [(300, 400), (400, 250)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_they_are_those_of_a_dense_decomposition(
    spectrum: str, shape: tuple[int, int], sizes: list[float], dtype: torch.dtype, kernels: Any
) -> None:
    W, change = weight(spectrum, *shape, dtype).to(dtype), update(*shape, sizes)
    dense, values, _ = torch.linalg.svd(W.double(), full_matrices=False)
    dense = dense[:, values > 1e-3 * values[0]]  # what W maps to nothing has no directions of its own
    y = torch.linalg.svd(W.double() + change.scale * change.B.double() @ change.A.double()).U[:, :10]
    expected = (dense.T @ y).abs().amax(0)
    multiplied = Weight(W, dtype if kernels is native_kernels else multiplied_in(dtype, W.device))
    with kernels():
        exact, found = (torch.tensor(f(multiplied, change, 10).cosines) for f in (intruders_exactly, intruders))
    clear = (expected - ALIKE).abs() > 0.2  # a mixture of neighbours in a flat spectrum is known no better
    torch.testing.assert_close(exact[clear], expected.float()[clear], rtol=0, atol=0.01)
    if spectrum == "rank-deficient" and dtype is torch.bfloat16:
        return  # its rounding fills what W maps to nothing with directions; only whole decompositions tell these apart
    assert torch.equal((found < ALIKE)[clear], (expected < ALIKE)[clear]), (found, expected)
    loud = sum(size > 1.2 * float(torch.linalg.matrix_norm(W.float(), 2)) for size in sizes)
    assert bool((found[:loud] < ALIKE).all())  # directions above all of W's are intruders, whatever the spectrum


def test_a_zero_update_brings_none() -> None:
    W = Weight(weight("power", 300, 400, torch.float32), torch.float32)
    assert min(intruders(W, update(300, 400, [0.0]), 10).cosines) > 0.95


@pytest.mark.parametrize("shape", [(12, 7), (24, 512), (512, 24), (170, 400)], ids=str)
def test_a_small_weight_is_looked_at_whole(shape: tuple[int, int]) -> None:
    W = Weight(torch.randn(*shape, generator=torch.Generator().manual_seed(1)), torch.float32)
    change = update(*shape, [100.0, 0.01])
    expected, found = intruders_exactly(W, change, 10), intruders(W, change, 10)
    assert len(found.cosines) == min(10, *shape)
    assert [c < ALIKE for c in found.cosines] == [c < ALIKE for c in expected.cosines]
    assert found.spectral_norm <= expected.spectral_norm * 1.001


def test_nothing_is_like_a_zero_weight() -> None:
    W = Weight(torch.zeros(300, 200), torch.float32)
    for find in (intruders, intruders_exactly):
        assert find(W, update(300, 200, [1.0]), 3).cosines == [0.0] * 3
