"""What a combination makes of its adapters, place by place: where they overlap, where they pull apart, what is lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch

from twofold.lowrank.algebra import Reduced, concatenated, decomposed, inner, norm
from twofold.lowrank.factors import LowRank
from twofold.lowrank.spectra import energy_rank, subspace_similarity
from twofold.merging.methods import Weighted, apart

ROWS = 128
"""How many rows of the updates, evenly spaced, are looked at entry by entry."""


@dataclass(frozen=True)
class PlaceSummary:
    """One module's updates, and the one that comes of them.

    Attributes:
        adapters: how many change it.
        r: rank of what comes out.
        norm: its Frobenius norm.
        lost: share of the energy that bringing it down to that rank took.
        off: how far it is from the plain weighted sum, relative to that, in Frobenius norm: what the method itself does, too.
        needed: the rank that keeps 99 % of the energy of the plain weighted sum.
        cosine: of the two weighted updates that are most opposed; None for a lone one.
        overlap, by_chance: the largest share of one update's output space that lies in another's, and what it would be on average
            if one of the two were drawn at random.
        conflict: share of the entries' size that cancels in the plain sum, read off some rows; two unrelated updates of
            equal size give 0.29.
    """

    name: str
    adapters: int
    r: int
    norm: float
    lost: float
    off: float
    needed: int
    cosine: float | None
    overlap: float | None
    by_chance: float | None
    conflict: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def summary(name: str, updates: Weighted, found: Reduced) -> PlaceSummary:
    """What there is to know of one module, from the factors."""
    together = concatenated(*apart(updates))
    size, made = norm(together), norm(found.update)
    pairs = list(combinations(updates, 2))
    overlaps = [_overlap(a, b) for (a, _), (b, _) in pairs]
    overlap, by_chance = max(overlaps, default=(None, None))
    return PlaceSummary(
        name=name,
        adapters=len(updates),
        r=found.update.rank,
        norm=made,
        lost=found.lost,
        off=_distance(found.update, together) / size if size else 0.0,
        needed=energy_rank(decomposed(together).values, 0.99),
        cosine=min((_cosine(a, b) for a, b in pairs), default=None),
        overlap=overlap,
        by_chance=by_chance,
        conflict=_conflict(updates),
    )


def total_lost(places: Sequence[PlaceSummary]) -> float:
    """The share of all energy that was lost: what a place kept is its squared norm, a share 1 - lost of what it had."""
    return share_lost([(p.norm / math.sqrt(1 - p.lost), p.lost) for p in places if p.lost < 1])


def share_lost(parts: Sequence[tuple[float, float]]) -> float:
    """The share of all energy that was lost, from each part's norm before and the share that it lost."""
    had = sum(norm**2 for norm, _ in parts)
    return sum(norm**2 * lost for norm, lost in parts) / had if had else 0.0


def _distance(a: LowRank, b: LowRank) -> float:
    """Frobenius norm of the difference, from the singular values, which do not cancel as squares of norms would."""
    return float(decomposed(concatenated([_double(a), _double(b)], [1.0, -1.0])).values.norm())


def _double(update: LowRank) -> LowRank:
    return LowRank(update.A.double(), update.B.double(), update.scale)


def _cosine(a: tuple[LowRank, float], b: tuple[LowRank, float]) -> float:
    (x, v), (y, w) = a, b
    sizes = norm(x) * norm(y)
    return inner(x, y) * math.copysign(1, v * w) / sizes if sizes else 0.0


def _overlap(a: LowRank, b: LowRank) -> tuple[float, float]:
    """phi of both output spaces whole, and what chance gives (`subspace_similarity`)."""
    found = decomposed(a), decomposed(b)
    counts = [one.rank for one in found]
    if not min(counts):
        return 0.0, 0.0
    return float(subspace_similarity(*(one.U[:, : one.rank] for one in found))[-1, -1]), max(counts) / len(a.B)


def _conflict(updates: Weighted) -> float:
    count = len(updates[0][0].B)
    rows = torch.linspace(0, count - 1, min(ROWS, count), dtype=torch.float64).long()
    parts = torch.stack([LowRank(u.A, u.B[rows], u.scale).delta() * w for u, w in updates])
    apart = float(parts.abs().sum())
    return max(0.0, 1 - float(parts.sum(0).abs().sum()) / apart) if apart else 0.0
