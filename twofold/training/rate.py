"""Which learning rate a handful of short runs speaks for: settings, and pure functions of the losses.

The runs share their start, their data and its order and differ in the rate alone, so that even small differences between
them are the rate's. The rule: take the LARGEST rate whose loss is nearly the best and which keeps clear of divergence.

That is Smith's range test (arXiv 1506.01186, section 3.3), which reads the rate where a ramp's loss stops falling and
begins to fray, with one difference: there one run climbs through all rates, so each point inherits what the lower rates
learnt and the minimum lies too far right; here each rate starts afresh and is judged by what it alone gains.
A rate has diverged if its loss is not finite or if, above the best rate, at least half of the best one's gain is lost again: a
model that fell apart can still be better than one that never saw the data.
Large, because a short run overrates nothing by much: the best rate of LoRA falls only from about 15 times full fine-tuning's
in very short runs to 10 times in longer ones, and does not depend on the rank where the scale is alpha / r (Schulman et
al. 2025, LoRA Without Regret), so that the rate found at one rank holds for others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from twofold.errors import ConfigError

FLAT = 0.01
"""A change of the loss by less than this share of itself says nothing."""
LOST = 0.5
"""A rate above the best one that forgoes this share of the best one's gain is over the edge."""


@dataclass(frozen=True, kw_only=True)
class RateSearch:
    """Short runs at learning rates that are evenly spaced in their logarithm.

    Attributes:
        lowest: the first rate.
        highest: the last.
        rates: how many, both included.
        steps: optimiser steps at each.
        warmup: share of the steps in which the rate rises linearly from zero; after that it is constant.
        margin: share of the best run's gain that a larger rate may fall short of.
        headroom: how many times larger than the suggestion the lowest diverging rate must be at least.
        held_out: examples of the held-out data to measure after each run; 0 for none.
    """

    lowest: float = 1e-5
    highest: float = 3.2e-2
    rates: int = 8
    steps: int = 16
    warmup: float = 0.2
    margin: float = 0.05
    headroom: float = 3.0
    held_out: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.lowest < self.highest < math.inf:
            raise ConfigError(f"lowest is {self.lowest} and highest {self.highest}, but 0 < lowest < highest must hold")
        for name, least in (("rates", 2), ("steps", 4), ("held_out", 0), ("headroom", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)} but must be at least {least}")
        if not (0 <= self.warmup < 1 and 0 <= self.margin < 1):
            raise ConfigError(
                f"warmup is {self.warmup} and margin {self.margin}; both are shares, at least 0 and below 1"
            )

    def grid(self) -> list[float]:
        """The rates, rising, in two digits."""
        growth = (self.highest / self.lowest) ** (1 / (self.rates - 1))
        return [float(f"{self.lowest * growth**i:.1e}") for i in range(self.rates)]


@dataclass(frozen=True)
class Trial:
    """One short run: the loss of each step, up to the first that was not finite; `held_out` is the loss after it."""

    rate: float
    losses: tuple[float, ...]
    finite: bool
    held_out: float | None = None

    @property
    def loss(self) -> float:
        """The mean over the last quarter of its steps; infinite for a run that did not get there."""
        return statistics.fmean(self.losses[-closing_steps(len(self.losses)) :]) if self.finite else math.inf


@dataclass(frozen=True)
class Choice:
    """The suggested rate, if there is one; the rates that diverged; and what speaks for it, in a sentence."""

    rate: float | None
    diverged: tuple[float, ...]
    reason: str


def closing_steps(steps: int) -> int:
    """How many steps at a run's end its loss is the mean of: a quarter."""
    return max(1, steps // 4)


def choose(trials: Sequence[Trial], untouched: float, search: RateSearch) -> Choice:
    """The rate that the runs speak for, by the rule above.

    Args:
        trials: at rising rates.
        untouched: the loss of the model as it was, on the batches that a run's `loss` is the mean of.
    """
    best = min(trials, key=lambda t: t.loss)
    gain = untouched - best.loss
    edge = best.loss + max(LOST * gain, FLAT * untouched)
    diverged = tuple(t.rate for t in trials if not t.finite or (t.rate > best.rate and t.loss > edge))
    if gain < FLAT * untouched:
        said = f"no rate lowered the loss from {untouched:.4g} by {FLAT:.0%}; try more steps (find_lr.steps) or other rates"
        return Choice(None, diverged, said)
    limit = min(diverged, default=math.inf)
    clear = [t for t in trials if t.rate * search.headroom <= limit and t.loss <= (1 - FLAT) * untouched]
    if not clear:
        said = f"every rate that learnt something lies too near {limit:g}, which diverged; try rates between (find_lr.rates)"
        return Choice(None, diverged, said)
    best = min(clear, key=lambda t: t.loss)
    slack = search.margin * (untouched - best.loss)
    chosen = max((t for t in clear if t.loss <= best.loss + slack), key=lambda t: t.rate)
    return Choice(chosen.rate, diverged, _reason(chosen, best, trials, untouched, limit))


def _reason(chosen: Trial, best: Trial, trials: Sequence[Trial], untouched: float, limit: float) -> str:
    said = f"its loss, {chosen.loss:.4g} against {untouched:.4g} untouched, "
    said += "is the lowest" if chosen is best else f"is near the lowest, {best.loss:.4g} at {best.rate:g}"
    said += f", and {limit:g} is the first rate to diverge" if math.isfinite(limit) else "; no rate diverged"
    if chosen is trials[-1]:
        return f"{said}; it is the highest that was tried, so a higher one may do better (find_lr.highest)"
    if chosen is trials[0]:
        return f"{said}; it is the lowest that was tried, so a lower one may do better (find_lr.lowest)"
    return said
