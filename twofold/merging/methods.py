"""The ways in which the updates of one module become one: from the factors where that is exact, else from the true deltas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twofold.errors import ConfigError, did_you_mean
from twofold.lowrank import algebra
from twofold.lowrank.algebra import Reduced
from twofold.lowrank.factors import LowRank

Weighted = list[tuple[LowRank, float]]
"""The updates of one module, each with its adapter's weight."""


@dataclass(frozen=True)
class Combination:
    """How updates become one.

    Attributes:
        method: a name of METHODS.
        r: largest rank of what comes out, where the method brings it down to one; None for the largest of the adapters'.
        density: the share of entries that ties, dare and pruning keep.
    """

    method: str = "cat"
    r: int | None = None
    density: float = 1.0


def _cat(found: Weighted, r: int, density: float) -> Reduced:
    return Reduced(algebra.concatenated(*apart(found)), 0.0)


def _svd(found: Weighted, r: int, density: float) -> Reduced:
    return algebra.truncated(algebra.concatenated(*apart(found)), r)


def _linear(found: Weighted, r: int, density: float) -> Reduced:
    return Reduced(algebra.linear(*apart(found)), 0.0)


def _ties(found: Weighted, r: int, density: float) -> Reduced:
    if len(found) == 1 and density == 1:
        return _svd(found, r, density)
    return algebra.factored(algebra.ties(*apart(found), density), r)


def _dare_linear(found: Weighted, r: int, density: float) -> Reduced:
    if density == 1:
        return _svd(found, r, density)
    return algebra.factored(algebra.sum_of(_thinned(found, density)), r)


def _dare_ties(found: Weighted, r: int, density: float) -> Reduced:
    if len(found) == 1 and density == 1:
        return _svd(found, r, density)
    return algebra.factored(algebra.elected(_thinned(found, density), [w for _, w in found]), r)


def _magnitude_prune(found: Weighted, r: int, density: float) -> Reduced:
    if density == 1:
        return _svd(found, r, density)
    return algebra.factored(algebra.sum_of([algebra.trimmed(u.delta() * w, density) for u, w in found]), r)


METHODS: dict[str, Callable[[Weighted, int, float], Reduced]] = {
    "cat": _cat,
    "svd": _svd,
    "linear": _linear,
    "ties": _ties,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
    "magnitude_prune": _magnitude_prune,
}
"""From the updates of a module, the rank asked for and the density to the one that comes out."""


def apart(found: Weighted) -> tuple[list[LowRank], list[float]]:
    """Updates and weights, each in a list of its own."""
    return [u for u, _ in found], [w for _, w in found]


def _thinned(found: Weighted, density: float) -> list[Tensor]:
    """Drawn from torch's generator, as starts are."""
    return algebra.dare(*apart(found), density, torch.default_generator)


def problems_of(how: Combination) -> list[str]:
    """What is wrong with a combination, whatever is combined."""
    problems = []
    if how.method not in METHODS:
        problems.append(f"the method '{how.method}' is none of {', '.join(METHODS)}{did_you_mean(how.method, METHODS)}")
    if not 0 < how.density <= 1:
        problems.append(f"density is {how.density}, but must be above 0 and at most 1")
    if how.r is not None and how.r < 1:
        problems.append(f"the rank is {how.r}, but must be at least 1")
    return problems


def reduced_by(how: Combination, module: str, updates: Weighted, r: int) -> Reduced:
    """The updates of `module` as one, of rank r at most where the method brings it down.

    Raises:
        ConfigError: `linear` would not be exact.
    """
    try:
        return METHODS[how.method](updates, r, how.density)
    except ConfigError as error:
        raise ConfigError(f"adapters cannot be combined by '{how.method}' in '{module}': {error}") from error
