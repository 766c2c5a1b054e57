"""Rank after the fact: from one training at a high rank, the held-out loss at every smaller one, and the smallest that will do.

Every module is cut to the same rank by the best there is, its singular value decomposition; nothing is trained again. A training at
the smaller rank may do better than a cut of a larger one, so this is an upper bound on the loss that the rank costs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twofold import atomic
from twofold.adapter.attach import active, shares
from twofold.base.head import task_of
from twofold.base.load import Base
from twofold.data.examples import DataConfig
from twofold.errors import AdapterFileError, ConfigError, RunError
from twofold.events import Emit, Progress, silent
from twofold.layers.linear import LinearShare
from twofold.layers.saved import BiasShare, CopyShare
from twofold.layers.tokens import TiedTokens, TokensShare
from twofold.lowrank.algebra import Decomposition, decomposed
from twofold.merging.resize import Size
from twofold.recipes.pictures import Series, picture
from twofold.recipes.resize import resize
from twofold.recipes.tasks import TASKS
from twofold.recipes.train import held_out_loss

WHOLE = (CopyShare, BiasShare, TokensShare, TiedTokens)
"""Shares without factors; factors of experts are shares of a bias too, and not among them."""


@dataclass(frozen=True, kw_only=True)
class Tolerated:
    """What the smaller rank may cost.

    Attributes:
        tolerance: share of the held-out loss by which it may rise.
        data: held-out data.
    """

    tolerance: float
    data: str

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf:
            raise ConfigError(f"tolerance is {self.tolerance}, but must be a number of at least 0, as in 0.01")


def resize_by_loss(base: Base, adapter: Path, output: Path, asked: Tolerated, emit: Emit = silent) -> dict[str, Any]:
    """Measure every rank, write the adapter at the smallest whose loss, and that of all above it, stays within the tolerance.

    Args:
        base: with the adapter, and it alone, attached and active.

    Returns:
        what `resize` says, and `losses` by rank; the curve is drawn beside the output.

    Raises:
        ConfigError: its factors are no plain ones on linear layers; what it holds whole stays as it is.
        AdapterFileError: with all of its rank its loss is not finite.
        RunError: the output exists.
    """
    if output.exists():
        raise RunError(f"{output} exists already; choose another output or remove it first")
    started = time.perf_counter()
    task = TASKS[task_of(base.model)]
    examples = task.examples(asked.data, task.limited(DataConfig(train=asked.data), base, emit), base, emit)
    found = _Cuts(base.model)
    losses = {}
    for r in range(found.highest, 0, -1):
        found.cut(r)
        losses[r] = held_out_loss(base, examples).loss
        if not math.isfinite(losses[found.highest]):
            raise AdapterFileError(f"the held-out loss of {adapter} is {losses[r]}, so no rank of it can be chosen")
        emit(Progress(task="measuring ranks", done=found.highest - r + 1, total=found.highest))
    chosen = smallest(losses, asked.tolerance)
    told = resize(adapter, output, Size(r=chosen), emit)
    drawn = _drawn(losses, asked.tolerance)
    atomic.write_text(output.with_name(f"{output.name}-ranks.svg"), drawn)
    measured = {str(r): loss for r, loss in sorted(losses.items())}
    return {**told, "losses": measured, "tolerance": asked.tolerance, "seconds": time.perf_counter() - started}


def smallest(losses: dict[int, float], tolerance: float) -> int:
    """The smallest rank from which on every loss is within `tolerance` of the highest rank's."""
    ranks = sorted(losses, reverse=True)
    limit, chosen = (1 + tolerance) * losses[ranks[0]], ranks[0]
    for r in ranks[1:]:
        if not losses[r] <= limit:  # NaN is not within it
            break
        chosen = r
    return chosen


class _Cuts:
    """An attached adapter whose updates can be cut to any rank, in place.

    Attributes:
        highest: the largest rank of a module.
    """

    def __init__(self, model: nn.Module) -> None:
        shares = _plain_shares(model)
        for share in shares:
            _scale_into_factors(share)
        self.found: list[tuple[LinearShare, Decomposition]] = [(s, decomposed(s.low_rank())) for s in shares]
        self.highest = max(len(share.A) for share, _ in self.found)

    @torch.no_grad()
    def cut(self, r: int) -> None:
        """Every module at rank r, or at its own where that is smaller."""
        for share, whole in self.found:
            update = whole.truncated(r, 0.0).update
            share.A.data, share.B.data = update.A.to(share.A.dtype), update.B.to(share.B.dtype)


@torch.no_grad()
def _scale_into_factors(share: LinearShare) -> None:
    """Make it the same update at scale 1."""
    for factor in (share.B, share.b_bias):
        if factor is not None:
            factor.data = factor * share.scale
    share.scale = 1.0


def _plain_shares(model: nn.Module) -> Sequence[LinearShare]:
    """An adapter's factors, without what it holds whole, which has no rank."""
    (name,) = active(model)
    found = {n: s for n, s in shares(model, name).items() if type(s) not in WHOLE}
    plain = {n: s for n, s in found.items() if type(s) is LinearShare and s.magnitude is None and s.start_A is None}
    if odd := [n for n in found if n not in plain]:
        raise ConfigError(
            f"'{odd[0]}' is adapted by more than plain factors, which cannot be cut; resize by --r or --energy"
        )
    if not plain:
        raise ConfigError("this adapter holds everything whole, and has no rank to cut")
    return list(plain.values())


def _drawn(losses: dict[int, float], tolerance: float) -> str:
    points = sorted((float(r), loss) for r, loss in losses.items())
    limit = (1 + tolerance) * points[-1][1]
    series = [Series("cut to a rank", points), Series("tolerance", [(points[0][0], limit), (points[-1][0], limit)])]
    return picture("Held-out loss of an adapter cut to smaller ranks", "rank", series)
