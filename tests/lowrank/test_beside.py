"""A weight beside its update, read some rows at a time, against dense decompositions in float64."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from twofold.lowrank.algebra import bases_of
from twofold.lowrank.beside import Weight, sizes
from twofold.lowrank.factors import LowRank
from twofold.native.training import native_kernels


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def falling(out: int, in_: int) -> Tensor:
    """A weight whose singular values fall off."""
    u, v = (torch.linalg.qr(random(n, min(out, in_), seed=n)).Q for n in (out, in_))
    return (u * torch.arange(1, min(out, in_) + 1.0).pow(-0.7)) @ v.T


@pytest.mark.parametrize(
    ("stored", "multiplied", "close"),
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.bfloat16, torch.float32, 1e-4),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.float64, torch.float32, 1e-4),
    ],
)
@pytest.mark.parametrize("kernels", [native_kernels, nullcontext], ids=["ours", "PyTorch's"])
@pytest.mark.parametrize(
    ("out", "in_", "turned"),
    [(1500, 700, False), (700, 1500, False), (1500, 700, True), (9000, 600, False), (12, 7, False)],
)
def test_they_are_those_of_dense_decompositions(
    stored: torch.dtype, multiplied: torch.dtype, close: float, out: int, in_: int, turned: bool, kernels: Any
) -> None:
    weight = falling(in_, out).to(stored).T if turned else falling(out, in_).to(stored)
    before, update = weight.clone(), LowRank(random(4, in_, seed=1), random(out, 4, seed=2), 0.5)
    with kernels():
        found = sizes(Weight(weight, multiplied), bases_of(update))
    u, values, vh = torch.linalg.svd(update.delta().double(), full_matrices=False)
    own = u[:, :4].T @ before.double() @ vh[:4].T
    assert found.frobenius_norm == pytest.approx(float(before.double().norm()), rel=1e-4)
    assert found.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(before.double(), 2)), rel=0.05)
    assert found.amplification == pytest.approx(float(values.norm() / own.norm()), rel=close)
    assert torch.equal(weight, before)


def test_what_is_zero() -> None:
    update = LowRank(random(2, 30), random(40, 2), 1.0)
    nothing = LowRank(random(2, 30), torch.zeros(40, 2), 1.0)
    assert sizes(Weight(torch.zeros(40, 30), torch.float32), bases_of(update)) == (0.0, 0.0, math.inf)
    assert sizes(Weight(random(40, 30), torch.float32), bases_of(nothing)).amplification == 0.0
    assert sizes(Weight(torch.zeros(40, 30), torch.float32), bases_of(nothing)).amplification == 0.0


def test_a_known_norm_is_kept() -> None:
    update = LowRank(random(2, 30), random(40, 2), 1.0)
    assert sizes(Weight(random(40, 30), torch.float32), bases_of(update), 7.0).spectral_norm == 7.0
