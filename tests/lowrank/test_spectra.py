"""Singular values read off the factors, against a dense SVD and against spectra that are known beforehand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twofold.lowrank.factors import LowRank
from twofold.lowrank.init import STARTS, embedding
from twofold.lowrank.spectra import effective_rank, energy_rank, singular_values, stable_rank


def with_spectrum(values: Tensor, out: int, inner: int, seed: int = 0, scale: float = 1.0) -> LowRank:
    """Float64 factors whose delta has exactly these singular values, the weight spread unevenly over A and B."""
    g = torch.Generator().manual_seed(seed)
    r = values.numel()
    u = torch.linalg.qr(torch.randn(out, r, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(inner, r, generator=g, dtype=torch.float64)).Q
    mix = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64)).Q
    root = values.double().sqrt()
    return LowRank((mix @ (root[:, None] * v.T)), (u * root) @ mix.T, scale)


@given(
    out=st.integers(1, 12),
    inner=st.integers(1, 12),
    r=st.integers(1, 14),
    scale=st.floats(-4, 4).filter(lambda s: abs(s) > 1e-3),
    seed=st.integers(0, 999),
)
def test_singular_values_are_those_of_the_dense_delta(out: int, inner: int, r: int, scale: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    factors = LowRank(torch.randn(r, inner, generator=g), torch.randn(out, r, generator=g), scale)
    dense = torch.linalg.svdvals(factors.B.double() @ factors.A.double()) * abs(scale)
    found = singular_values(factors)
    assert found.dtype is torch.float64
    assert found.shape == (min(out, inner, r),)
    torch.testing.assert_close(found, dense[: found.numel()], rtol=1e-9, atol=1e-12)
    assert float(dense[found.numel() :].sum()) <= 1e-9 * float(dense[0])


@pytest.mark.parametrize("smallest", [1e-2, 1e-5, 1e-8])
def test_small_values_beside_large_ones_stay_accurate(smallest: float) -> None:
    values = torch.logspace(0, math.log10(smallest), 6, dtype=torch.float64)
    found = singular_values(with_spectrum(values, 40, 30, scale=3.0))
    torch.testing.assert_close(found, 3 * values, rtol=1e-6, atol=0)


def test_zero_delta_and_rank_deficiency() -> None:
    zero = singular_values(LowRank(torch.randn(4, 10), torch.zeros(8, 4), 2.0))
    assert zero.tolist() == [0.0] * 4
    assert (stable_rank(zero), effective_rank(zero), energy_rank(zero, 0.99)) == (0.0, 0.0, 0)
    row = torch.randn(1, 10)
    single = singular_values(LowRank(row.repeat(4, 1), torch.randn(8, 4), 1.0))
    assert float(single[1]) < 1e-7 * float(single[0])
    assert stable_rank(single) == pytest.approx(1.0)
    assert effective_rank(single) == pytest.approx(1.0, abs=1e-4)
    assert energy_rank(single, 0.999) == 1


@pytest.mark.parametrize("r", [1, 2, 7])
def test_equal_values_give_their_number(r: int) -> None:
    values = torch.full((r,), 0.3, dtype=torch.float64)
    assert stable_rank(values) == pytest.approx(r)
    assert effective_rank(values) == pytest.approx(r)
    assert energy_rank(values, 1.0) == r
    assert energy_rank(values, 0.5) == math.ceil(r / 2)


@given(
    values=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12),
    share=st.sampled_from([0.1, 0.5, 0.9, 0.99, 0.999999, 1.0]),
)
def test_the_energy_rank_is_the_smallest_that_keeps_the_share(values: list[float], share: float) -> None:
    spectrum = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    energy = [v * v for v in spectrum.tolist()]
    found = energy_rank(spectrum, share)
    assert 1 <= found <= len(values)
    assert math.fsum(energy[:found]) >= share * math.fsum(energy) * (1 - 1e-12)
    assert found == 1 or math.fsum(energy[: found - 1]) < share * math.fsum(energy) * (1 + 1e-12)


@given(values=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12), factor=st.floats(1e-3, 1e3))
def test_ranks_do_not_depend_on_the_volume_and_lie_between_1_and_r(values: list[float], factor: float) -> None:
    spectrum = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    for measure in (stable_rank, effective_rank):
        assert 1 - 1e-9 <= measure(spectrum) <= len(values) + 1e-9
        assert measure(spectrum * factor) == pytest.approx(measure(spectrum), rel=1e-6)
    p = [v / math.fsum(values) for v in values]
    assert effective_rank(spectrum) == pytest.approx(math.exp(-math.fsum(q * math.log(q) for q in p)), rel=1e-6)


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_every_start_has_a_zero_delta_and_is_drawn_from_the_seed(start: bool | str) -> None:
    torch.manual_seed(3)
    A, B = STARTS[start](4, 300, 20)
    assert (A.shape, B.shape) == ((4, 300), (20, 4))
    assert not B.any()
    torch.manual_seed(3)
    assert torch.equal(STARTS[start](4, 300, 20)[0], A)
    spread = {True: 1 / math.sqrt(3 * 300), "gaussian": 1 / 4}[start]
    assert float(A.std()) == pytest.approx(spread, rel=0.1)


def test_the_start_of_an_embedding_has_its_zero_in_a() -> None:
    A, B = embedding(4, 100, 500)
    assert (A.shape, B.shape) == ((4, 100), (500, 4))
    assert not A.any()
    assert float(B.std()) == pytest.approx(1.0, rel=0.1)
