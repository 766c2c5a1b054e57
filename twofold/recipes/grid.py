"""Grids of trainings: axes as people write them, cells, and what the cells' losses say, with its uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from twofold.errors import ConfigError
from twofold.recipes.settings import TrainConfig

RATE, RANK = "training.learning_rate", "adapter.r"
PER_DECADE = 2
"""Rates of a range `a..b`, about so many for each power of ten."""
Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Cell:
    """One training of a grid: what differs from the common configuration, by flag name, and its seed."""

    settings: Settings
    seed: int

    @property
    def label(self) -> str:
        """A name for its folder."""
        said = "-".join(f"{name.rpartition('.')[2]}={_short(value)}" for name, value in self.settings)
        return f"{said or 'plain'}-seed={self.seed}".replace("/", "_")

    @property
    def group(self) -> Settings:
        """All but the learning rate: what is halved together, since ranks are compared at their own best rates."""
        return tuple((name, value) for name, value in self.settings if name != RATE)

    def of(self, config: TrainConfig) -> TrainConfig:
        """The configuration of this training.

        Raises:
            ConfigError: a setting that is not the adapter's or the training's, or a value that cannot be.
        """
        return changed(config, {**dict(self.settings), "training.seed": self.seed})


def _short(value: Any) -> str:
    """As few digits as tell it from every other value."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def changed(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """A configuration with some settings of its adapter and its training replaced, by their names as flags."""
    parts: dict[str, dict[str, Any]] = {"adapter": {}, "training": {}}
    for name, value in settings.items():
        part, _, field = name.partition(".")
        if part not in parts or not hasattr(getattr(config, part), field):
            raise ConfigError(f"a grid is over settings of adapter and training, and '{name}' is none of these")
        parts[part][field] = value
    return replace(config, **{part: replace(getattr(config, part), **found) for part, found in parts.items()})


def ranks(text: str) -> list[int]:
    """`4,16,64` as numbers.

    Raises:
        ConfigError: no list of ranks.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"'{text}' is no list of ranks; write them as in 4,16,64")
    return sorted(set(found))


def rates(text: str) -> list[float]:
    """`1e-4,3e-4` as numbers; `1e-4..3e-3` as rates evenly spaced in their logarithm, two a power of ten; `1e-4..3e-3:8` as eight.

    Raises:
        ConfigError: neither a list nor a range of positive numbers.
    """
    try:
        first, dots, rest = text.partition("..")
        if not dots:
            found = [float(part) for part in text.split(",")]
        else:
            last, _, given = rest.partition(":")
            low, high = float(first), float(last)
            count = int(given) if given else 1 + round(PER_DECADE * math.log10(high / low))
            found = spaced(low, high, count)
    except (ValueError, ZeroDivisionError, OverflowError):
        found = []
    if not found or not all(0 < rate < math.inf for rate in found):
        raise ConfigError(f"'{text}' is no list of learning rates; write 1e-4,3e-4,1e-3 or a range as in 1e-4..3e-3")
    return sorted(set(found))


def spaced(low: float, high: float, count: int) -> list[float]:
    """Rates evenly spaced in their logarithm, both ends included, in two digits."""
    if count < 2 or high <= low:
        raise ValueError("a range has two ends")
    return [float(f"{low * (high / low) ** (i / (count - 1)):.1e}") for i in range(count)]


def cells(axes: Mapping[str, Sequence[Any]], seeds: Iterable[int]) -> list[Cell]:
    """Every combination of the axes' values, with every seed."""
    settings = [tuple(zip(axes, values, strict=True)) for values in product(*axes.values())]
    return [Cell(one, seed) for seed in seeds for one in settings]


@dataclass(frozen=True)
class Score:
    """What the seeds of one setting gave.

    Attributes:
        mean, spread: of the held-out losses; the spread is their standard deviation, None of a lone one.
        finished: whether all of it was trained, and nothing stopped early.
    """

    settings: Settings
    mean: float
    spread: float | None
    seeds: int
    finished: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "settings": dict(self.settings),
            "mean": self.mean if math.isfinite(self.mean) else None,
            "spread": self.spread,
            "seeds": self.seeds,
            "finished": self.finished,
        }


def scores(results: Sequence[Mapping[str, Any]]) -> list[Score]:
    """The settings, best first; those that were stopped early behind all others.

    Args:
        results: of cells, with `settings`, `seed`, `loss` (None if not finite) and `finished`.
    """
    by_settings: dict[Settings, list[Mapping[str, Any]]] = {}
    for one in results:
        by_settings.setdefault(tuple(one["settings"].items()), []).append(one)
    found = [_score(settings, some) for settings, some in by_settings.items()]
    return sorted(found, key=lambda s: (not s.finished, s.mean))


def _score(settings: Settings, some: Sequence[Mapping[str, Any]]) -> Score:
    losses = [math.inf if one["loss"] is None else one["loss"] for one in some]
    finite = all(map(math.isfinite, losses))
    mean = statistics.fmean(losses) if finite else math.inf
    spread = statistics.stdev(losses) if finite and len(losses) > 1 else None
    return Score(settings, mean, spread, len(losses), all(one["finished"] for one in some))


NEAR = 0.1
"""Relative difference of losses up to which settings tell of the best one's noise. A rate at which some seeds diverge spreads far
more, and is worse by more."""


def noise(found: Sequence[Score]) -> float | None:
    """The standard error of a difference of two settings' means, from the seeds of those near the best; None without repetitions.

    The spreads are pooled: three seeds of one setting say little, those of several settings together more.
    """
    known = [s for s in found if s.finished and s.spread is not None]
    if not known:
        return None
    near = [s for s in known if s.mean <= (1 + NEAR) * min(s.mean for s in known)]
    pooled = sum((s.seeds - 1) * (s.spread or 0.0) ** 2 for s in near) / sum(s.seeds - 1 for s in near)
    return math.sqrt(pooled * 2 / min(s.seeds for s in near))


CLOSE = 0.01
"""Relative difference of losses that is taken for nothing where there is one seed: variants at their own best rates differ by 1 to
2 % (arXiv 2602.04998)."""


def recommend(found: Sequence[Score]) -> dict[str, Any]:
    """The best setting, those that cannot be told from it, and the cheapest among them.

    Within two standard errors of a difference counts as not told apart; where every setting ran with one seed, within 1 %.
    """
    finished = [s for s in found if s.finished and math.isfinite(s.mean)]
    if not finished:
        return {"settings": None, "reason": "no training came to its end with a finite loss"}
    best, error = finished[0], noise(found)
    margin = CLOSE * best.mean if error is None else 2 * error
    level = [s for s in finished if s.mean <= best.mean + margin]
    chosen = min(level, key=lambda s: (dict(s.settings).get(RANK, 0), s.mean))
    how = "one seed each, so within 1 %" if error is None else f"within two standard errors, {margin:.2g}"
    return {
        "settings": dict(chosen.settings),
        "mean": chosen.mean,
        "best": best.as_json(),
        "standard_error_of_a_difference": error,
        "margin": margin,
        "level_with_the_best": [dict(s.settings) for s in level],
        "rates": _rates_of(level, chosen),
        "reason": f"the smallest rank among {len(level)} settings that cannot be told from the best ({how})"
        if len(level) > 1
        else f"better than any other ({how})",
    }


def _rates_of(level: Sequence[Score], chosen: Score) -> list[float]:
    """The rates at which the chosen setting does as well."""
    alike = [dict(s.settings) for s in level]
    rest = {k: v for k, v in chosen.settings if k != RATE}
    return sorted(s[RATE] for s in alike if RATE in s and {k: v for k, v in s.items() if k != RATE} == rest)
