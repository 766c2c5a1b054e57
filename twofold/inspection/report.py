"""What an adapter is, read off its factors: norms, ranks and energy per module and in all, without a base and without BA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from twofold.adapter.files import AdapterFiles
from twofold.adapter.updates import updates_of
from twofold.inspection.against_base import BesideBase
from twofold.inspection.lint import Finding, lint_config, lint_update, lint_values
from twofold.lowrank.factors import LowRank
from twofold.lowrank.spectra import effective_rank, energy_rank, singular_values, stable_rank
from twofold.tensorfile import nonfinite

ENOUGH = 0.99
"""The share of a module's energy that the suggested rank keeps."""


@dataclass(frozen=True)
class ModuleReport:
    """One module's update: norms are of scale·B·A; ranks are counts of directions.

    Attributes:
        energy_rank_90, energy_rank_95, energy_rank_99: the smallest rank that keeps so many per cent of the squared norm.
        singular_values: of scale·B·A, largest first.
        beside_base: what the base's weight makes of it, where the base was given.
    """

    name: str
    r: int
    scale: float
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    effective_rank: float
    energy_rank_90: int
    energy_rank_95: int
    energy_rank_99: int
    singular_values: list[float]
    beside_base: BesideBase | None = None


@dataclass(frozen=True)
class TotalReport:
    """All updates as one, side by side as the blocks of one large matrix.

    Attributes:
        r: the sum of the ranks.
        energy_rank_99: how many directions, of all modules together, keep 99 % of all energy.
    """

    modules: int
    r: int
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    effective_rank: float
    energy_rank_90: int
    energy_rank_95: int
    energy_rank_99: int


@dataclass(frozen=True)
class AdapterReport:
    """An adapter, module by module; one that holds NaN or infinity has a finding in place of figures."""

    r: int
    modules: list[ModuleReport]
    findings: list[Finding] = field(default_factory=list)

    @property
    def suggested_rank(self) -> int:
        """The rank that keeps 99 % of the energy in every module."""
        return max((m.energy_rank_99 for m in self.modules), default=0)

    @property
    def total(self) -> TotalReport | None:
        """Of all modules; None where no module has figures."""
        return _total(self.modules) if self.modules else None

    def as_json(self) -> dict[str, Any]:
        total = self.total
        return {**asdict(self), "total": total and asdict(total), "suggested_rank": self.suggested_rank}


def report_adapter(
    files: AdapterFiles, beside: Mapping[str, BesideBase] | None = None, found: Sequence[Finding] = ()
) -> AdapterReport:
    """Inspect an opened adapter.

    Args:
        beside: what a base makes of each update, by name (`against_base`).
        found: what was found beside what the adapter alone says.

    Raises:
        AdapterFileError: a module has only one of its two factors.
    """
    updates = updates_of(files)
    broken = [name for name, update in updates.items() if nonfinite({"A": update.A, "B": update.B})]
    findings = [*found, *lint_values(files)]
    reports = []
    for name, update in updates.items():
        if name not in broken:
            values = singular_values(update)
            reports.append(_module(name, update, values, (beside or {}).get(name)))
            findings += lint_update(name, update, values)
    return AdapterReport(files.config.r, reports, [*findings, *lint_config(files, updates)])


def _module(name: str, update: LowRank, values: Tensor, beside: BesideBase | None) -> ModuleReport:
    return ModuleReport(
        name=name,
        r=update.rank,
        scale=update.scale,
        frobenius_norm=float(values.norm()),
        spectral_norm=float(values[0]),
        stable_rank=stable_rank(values),
        effective_rank=effective_rank(values),
        energy_rank_90=energy_rank(values, 0.90),
        energy_rank_95=energy_rank(values, 0.95),
        energy_rank_99=energy_rank(values, ENOUGH),
        singular_values=values.tolist(),
        beside_base=beside,
    )


def _total(modules: Sequence[ModuleReport]) -> TotalReport:
    values = (
        torch.tensor([v for m in modules for v in m.singular_values], dtype=torch.float64).sort(descending=True).values
    )
    return TotalReport(
        modules=len(modules),
        r=sum(m.r for m in modules),
        frobenius_norm=float(values.norm()),
        spectral_norm=float(values[0]),
        stable_rank=stable_rank(values),
        effective_rank=effective_rank(values),
        energy_rank_90=energy_rank(values, 0.90),
        energy_rank_95=energy_rank(values, 0.95),
        energy_rank_99=energy_rank(values, ENOUGH),
    )
