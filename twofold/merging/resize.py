"""An adapter at other ranks: the best one of every module, from its factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from twofold.adapter.files import AdapterFiles
from twofold.adapter.updates import Pair, has_groups, low_rank, pairs_of
from twofold.adapter.whole import unknown_said
from twofold.errors import ConfigError
from twofold.events import Emit, Progress
from twofold.lowrank.algebra import decomposed
from twofold.lowrank.factors import LowRank
from twofold.lowrank.spectra import energy_rank


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large an adapter is to be: one of the three.

    Attributes:
        r: rank of every module, at most what it has.
        energy: share of the squared Frobenius norm that every module keeps, at the smallest rank that does.
        ratio: keep the directions whose singular value is at least the module's largest over this.
    """

    r: int | None = None
    energy: float | int | None = None
    ratio: float | int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("r", "energy", "ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"say one of --r, --energy and --ratio, not {' and '.join(given) or 'none'}")
        if self.r is not None and self.r < 1:
            raise ConfigError(f"the rank is {self.r}, but must be at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"energy is {self.energy}, but must be above 0 and at most 1, as in 0.99")
        if self.ratio is not None and not self.ratio >= 1:
            raise ConfigError(f"ratio is {self.ratio}, but must be at least 1")

    def rank(self, values: Tensor) -> int:
        """The rank of a module with these singular values, largest first."""
        if self.r is not None:
            return self.r
        if self.energy is not None:
            return max(1, energy_rank(values, self.energy))
        return max(1, int((values * (self.ratio or 1) >= values[0]).sum())) if values[0] > 0 else 1


@dataclass(frozen=True)
class Resized:
    """One module: its rank before and after, the Frobenius norm before, and the share of the energy that is lost."""

    name: str
    before: int
    r: int
    norm: float
    lost: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def resized_updates(files: AdapterFiles, size: Size, emit: Emit) -> Iterator[tuple[Pair, LowRank, Resized]]:
    """Every update at its new rank, and what that took.

    Raises:
        ConfigError: the adapter's factors are no plain matrices.
    """
    pairs = list(pairs_of(files))
    _check(files, pairs)
    for i, pair in enumerate(pairs, 1):
        update = low_rank(files, pair)
        found = decomposed(update)
        reduced = found.truncated(size.rank(found.values), float(found.values.square().sum()))
        smaller = LowRank(reduced.update.A.float(), reduced.update.B.float(), 1.0)
        norm = float(found.values.norm())
        yield pair, smaller, Resized(pair.name, update.rank, smaller.rank, norm, reduced.lost)
        emit(Progress(task="resizing modules", done=i, total=len(pairs)))


def _check(files: AdapterFiles, pairs: list[Pair]) -> None:
    grouped = [pair.name for pair in pairs if has_groups(files, pair)]
    if grouped:
        raise ConfigError(f"'{grouped[0]}' is a convolution with groups, whose update is no one product of two factors")
    if unknown := unknown_said(files):
        raise ConfigError(unknown)
    if not pairs:
        raise ConfigError(f"{files.path} holds no factors, so there is nothing to resize")
