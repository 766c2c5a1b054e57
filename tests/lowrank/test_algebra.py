"""Sums and truncations of updates against dense float64 linear algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twofold.errors import ConfigError
from twofold.lowrank.algebra import (
    concatenated,
    cross_terms,
    dare,
    decomposed,
    factored,
    inner,
    leading,
    linear,
    norm,
    ties,
    trimmed,
    truncated,
)
from twofold.lowrank.factors import LowRank


def update(r: int, out: int = 13, in_: int = 9, scale: float = 1.5, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(r, in_, generator=generator).double(), torch.randn(out, r, generator=generator).double(), scale
    )


def dense(u: LowRank) -> Tensor:
    return u.scale * (u.B.double() @ u.A.double())


def best_error(delta: Tensor, r: int) -> float:
    return float(torch.linalg.svdvals(delta.double())[r:].square().sum())


def close(a: Tensor, b: Tensor, relative: float = 1e-9) -> bool:
    return float((a - b).norm()) <= relative * max(float(b.norm()), 1e-30)


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    r=st.integers(1, 12),
)
def test_sums_are_exact_and_truncations_the_best(ranks: list[int], weights: list[float], r: int) -> None:
    updates = [update(k, scale=0.5 + i, seed=i) for i, k in enumerate(ranks)]
    chosen = weights[: len(updates)]
    total = sum((w * dense(u) for u, w in zip(updates, chosen, strict=True)), torch.zeros(13, 9).double())
    together = concatenated(updates, chosen)
    assert torch.allclose(dense(together), total, atol=1e-12)
    assert together.rank == sum(ranks)
    reduced = truncated(together, r)
    missing = float((dense(reduced.update) - total).square().sum())
    assert missing == pytest.approx(best_error(total, r), rel=1e-6, abs=1e-18)
    energy = float(total.square().sum())
    if energy > 1e-20:
        assert reduced.lost == pytest.approx(missing / energy, abs=1e-9)


@pytest.mark.parametrize("spectrum", [(1, 1e-4, 1e-8), (1, 1, 1), (5, 0, 0)])
def test_awkward_spectra_are_read_off_the_factors_as_off_the_dense_delta(spectrum: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 3, generator=generator).double()).Q for n in (40, 30))
    mix = torch.randn(3, 3, generator=generator).double()
    factors = LowRank(torch.linalg.inv(mix) @ v.T, (u * torch.tensor(spectrum).double()) @ mix, 2.0)
    found = decomposed(factors)
    assert torch.allclose(found.values, 2.0 * torch.tensor(spectrum).double(), rtol=1e-8, atol=1e-14)
    assert close((found.U * found.values) @ found.V.T, dense(factors))


SIZES = {"few": (4, 1.5), "more than asked for": (9, -0.3), "more than columns": (12, 2.0), "no scale": (3, 0.0)}


@pytest.mark.parametrize(("r", "scale"), SIZES.values(), ids=SIZES)
def test_leading_directions_are_those_of_the_dense_delta(r: int, scale: float) -> None:
    whole = update(r, scale=scale, seed=5)
    thin = LowRank(whole.A, whole.B * (torch.arange(r) < 2), scale)  # its columns have no decomposition of Cholesky's
    for one, count in ((whole, min(r, 6)), (thin, 2)):
        found, (u, values, vh) = leading(one, 6), torch.linalg.svd(dense(one), full_matrices=False)
        assert found.norm == pytest.approx(float(values.norm()), rel=1e-12)
        n = count if scale else 0
        assert found.U.shape[1] == found.V.shape[1] == n
        signs = (found.U * u[:, :n]).sum(0).sign()
        assert torch.allclose(found.U, u[:, :n] * signs, atol=1e-9)
        assert torch.allclose(found.V, vh[:n].T * signs, atol=1e-9)


def test_inner_products_and_norms_are_those_of_the_deltas() -> None:
    a, b = update(3), update(5, scale=-0.3, seed=4)
    assert inner(a, b) == pytest.approx(float((dense(a) * dense(b)).sum()), rel=1e-12)
    assert norm(b) == pytest.approx(float(dense(b).norm()), rel=1e-12)


def test_summed_factors_are_exact_where_one_factor_is_shared_and_refused_elsewhere() -> None:
    a = update(3)
    same_A = LowRank(a.A, update(3, seed=7).B, 0.25)
    assert close(dense(linear([a, same_A], [2.0, -1.0])), 2 * dense(a) - dense(same_A))
    same_B = LowRank(update(3, seed=8).A, a.B, 0.25)
    assert close(dense(linear([a, same_B], [0.5, 3.0])), 0.5 * dense(a) + 3 * dense(same_B))
    other = update(3, seed=9)
    A, B = (
        a.A * math.sqrt(a.scale) + other.A * math.sqrt(other.scale),
        a.B * math.sqrt(a.scale) + other.B * math.sqrt(other.scale),
    )
    true = dense(a) + dense(other)
    off = float((B @ A - true).norm() / true.norm())
    assert cross_terms([a, other], [1.0, 1.0]) == pytest.approx(off, rel=1e-9)
    with pytest.raises(ConfigError, match=f"off by {off:.0%} of the true sum; use 'cat' or 'svd'"):
        linear([a, other], [1.0, 1.0])


def brute_ties(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Entry by entry, as the paper says it."""
    parts = []
    for delta, weight in zip(deltas, weights, strict=True):
        flat = (delta * weight).flatten()
        order = flat.abs().argsort(descending=True)
        kept = torch.zeros_like(flat)
        chosen = order[: max(1, round(density * len(flat)))]
        kept[chosen] = flat[chosen]
        parts.append(kept.view_as(delta))
    result = torch.zeros_like(deltas[0])
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            entries = [float(p[i, j]) for p in parts]
            sign = math.copysign(1, sum(entries)) if sum(entries) else 0
            agreeing = [(e, abs(w)) for e, w in zip(entries, weights, strict=True) if e and math.copysign(1, e) == sign]
            if agreeing:
                mean = sum(e for e, _ in agreeing) / sum(w for _, w in agreeing)
                result[i, j] = mean * sum(abs(w) for w in weights)
    return result


@pytest.mark.parametrize("density", [1.0, 0.5, 0.2])
def test_ties_is_the_paper_entry_by_entry(density: float) -> None:
    updates, weights = [update(2, seed=i) for i in range(3)], [1.0, 0.5, -0.7]
    found = ties(updates, weights, density)
    assert close(found, brute_ties([dense(u) for u in updates], weights, density), 1e-6)


def test_one_adapter_alone_stays_what_it_is_at_density_one() -> None:
    a = update(4)
    assert close(ties([a], [1.0], 1.0), dense(a), 1e-6)
    (dropped,) = dare([a], [1.0], 1.0, torch.Generator().manual_seed(0))
    assert close(dropped, dense(a), 1e-6)
    assert close(dense(truncated(a, 4).update), dense(a))
    assert close(dense(concatenated([a], [1.0])), dense(a))


def test_dare_keeps_a_share_of_the_entries_and_the_mean() -> None:
    a = LowRank(torch.ones(1, 300), torch.ones(200, 1), 1.0)
    (dropped,) = dare([a], [1.0], 0.25, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)


def test_trimming_keeps_the_largest_entries() -> None:
    delta = torch.tensor([[1.0, -5.0, 0.5], [4.0, -0.1, 3.0]])
    assert torch.equal(trimmed(delta, 0.5), torch.tensor([[0.0, -5.0, 0.0], [4.0, 0.0, 3.0]]))


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_a_whole_delta_is_factored_within_a_per_cent_of_the_best(decay: float) -> None:
    """From white noise, the hardest spectrum, to one that falls off."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 300)).Q for n in (400, 300))
    delta = (u * torch.arange(1, 301.0).pow(-decay)) @ v.T
    best = best_error(delta, 16)
    sampled, exact = factored(delta, 16), factored(delta, 16, exact=True)
    for found, allowed in ((sampled, 1.01), (exact, 1.000001)):
        assert float((dense(found.update) - delta).square().sum()) <= best * allowed
        assert found.lost == pytest.approx(best / float(delta.square().sum()), rel=0.02)
        assert found.update.rank == 16
