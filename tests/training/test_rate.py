"""The choice of a learning rate from short runs: where it falls on curves of every kind."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.errors import ConfigError
from twofold.training.rate import RateSearch, Trial, choose, closing_steps

SEARCH = RateSearch()
UNTOUCHED = 4.0


def trials(losses: list[float | None], search: RateSearch = SEARCH) -> list[Trial]:
    """Runs that end with these losses; None for one that broke off."""
    return [
        Trial(rate, (UNTOUCHED,) * 3, False) if loss is None else Trial(rate, (UNTOUCHED,) * 12 + (loss,) * 4, True)
        for rate, loss in zip(search.grid(), losses, strict=True)
    ]


def valley(best: float, width: float = 0.8) -> list[float]:
    """Losses that fall towards a best rate, and climb behind it three times as steeply."""
    at = [math.log10(rate / best) / width for rate in SEARCH.grid()]
    return [1.0 + 3.0 * min(1.4, 1 - math.exp(-(x**2) * (1 if x < 0 else 3))) for x in at]


def test_the_grid_has_even_steps_in_the_logarithm_and_two_digits() -> None:
    assert SEARCH.grid() == [1e-5, 3.2e-5, 1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2]
    assert RateSearch(lowest=1e-4, highest=1e-2, rates=3).grid() == [1e-4, 1e-3, 1e-2]


def test_the_loss_of_a_run_is_the_mean_of_its_last_quarter() -> None:
    assert Trial(1e-3, (9.0,) * 12 + (1.0, 2.0, 3.0, 4.0), True).loss == 2.5
    assert Trial(1e-3, (9.0, 3.0, 1.0), True).loss == 1.0
    assert closing_steps(16) == 4
    assert Trial(1e-3, (9.0, 3.0, 1.0), False).loss == math.inf


def test_the_largest_rate_that_is_nearly_the_best() -> None:
    found = choose(trials([4.0, 3.9, 3.5, 2.0, 1.10, 1.00, 1.12, 1.9]), UNTOUCHED, SEARCH)
    assert found.rate == 1e-2, "it forgoes 4 % of the gain of 3, which the margin allows"
    assert "near the lowest, 1 at 0.0032" in found.reason
    strict = RateSearch(margin=0.03)
    assert choose(trials([4.0, 3.9, 3.5, 2.0, 1.10, 1.00, 1.12, 1.9]), UNTOUCHED, strict).rate == 3.2e-3


@pytest.mark.parametrize("bad", [None, 4.1, 9.0, 2.6])
def test_divergence_is_kept_clear_of(bad: float | None) -> None:
    """Not finite, worse than untouched, or with half of the gain lost again."""
    losses = [4.0, 3.9, 3.5, 2.0, 1.0, 0.99, bad, bad]
    found = choose(trials(losses), UNTOUCHED, SEARCH)
    assert found.diverged == (1e-2, 3.2e-2)
    assert found.rate == 3.2e-3
    assert "0.01 is the first rate to diverge" in found.reason
    assert choose(trials(losses), UNTOUCHED, RateSearch(headroom=4.0)).rate == 1e-3


def test_a_low_rate_that_learnt_little_has_not_diverged() -> None:
    found = choose(trials([4.01, 4.0, 3.9, 3.5, 3.0, 2.0, 1.5, 1.0]), UNTOUCHED, SEARCH)
    assert found.diverged == ()
    assert found.rate == 3.2e-2
    assert "a higher one may do better" in found.reason


def test_the_lowest_rate_may_be_the_best() -> None:
    found = choose(trials([1.0, 1.9, 2.4, 3.9, 4.2, 7.0, None, None]), UNTOUCHED, SEARCH)
    assert found.rate == 1e-5
    assert "a lower one may do better" in found.reason


@pytest.mark.parametrize("losses", [[4.0] * 8, [4.0, 4.01, 3.99, 3.98, 4.0, 3.97, 4.02, 4.0]])
def test_a_flat_curve_suggests_nothing(losses: list[float | None]) -> None:
    found = choose(trials(losses), UNTOUCHED, SEARCH)
    assert found.rate is None
    assert "no rate lowered the loss" in found.reason


@pytest.mark.parametrize("losses", [[None] * 8, [4.5, 4.6, 5.0, 6.0, 9.0, None, None, None]])
def test_nothing_but_harm_suggests_nothing(losses: list[float | None]) -> None:
    assert choose(trials(losses), UNTOUCHED, SEARCH).rate is None


def test_all_rates_near_the_edge_suggest_nothing() -> None:
    search = RateSearch(lowest=1e-2, highest=2e-2, rates=2)
    found = choose(trials([3.0, None], search), UNTOUCHED, search)
    assert found.rate is None
    assert "lies too near 0.02" in found.reason


@given(st.sampled_from([1e-4, 3.2e-4, 1e-3, 3.2e-3]), st.integers(0, 10_000))
def test_noise_moves_the_choice_by_one_place_at_most(best: float, seed: int) -> None:
    rng = random.Random(seed)
    noisy = trials([loss * (1 + rng.uniform(-0.02, 0.02)) for loss in valley(best)])
    found = choose(noisy, UNTOUCHED, SEARCH)
    assert found.rate is not None
    assert abs(math.log10(found.rate / best)) < 0.51


@given(st.lists(st.one_of(st.none(), st.floats(0.01, 50)), min_size=8, max_size=8))
def test_whatever_is_suggested_gained_and_is_clear_of_every_divergence(losses: list[float | None]) -> None:
    found = choose(trials(losses), UNTOUCHED, SEARCH)
    if found.rate is None:
        return
    loss = dict(zip(SEARCH.grid(), losses, strict=True))
    assert loss[found.rate] is not None
    assert loss[found.rate] < UNTOUCHED
    assert all(found.rate * SEARCH.headroom <= rate for rate in found.diverged)
    assert all(rate in found.diverged for rate, value in loss.items() if value is None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lowest": 0.0},
        {"lowest": 1e-2, "highest": 1e-3},
        {"rates": 1},
        {"steps": 2},
        {"margin": 1.0},
        {"headroom": 0.5},
    ],
)
def test_settings_without_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        RateSearch(**wrong)  # type: ignore[arg-type]
