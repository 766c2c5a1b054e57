"""What an adapter is, read off its factors: norms, ranks and energy per module, without a base and without BA."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from twofold.adapter.files import AdapterFiles
from twofold.adapter.updates import updates_of
from twofold.lowrank.factors import LowRank
from twofold.lowrank.spectra import effective_rank, energy_rank, singular_values, stable_rank
from twofold.tensorfile import nonfinite


@dataclass(frozen=True)
class ModuleReport:
    """One module's update: norms are of scale·B·A; ranks are counts of directions."""

    name: str
    r: int
    scale: float
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    effective_rank: float
    energy_rank_99: int


@dataclass(frozen=True)
class Finding:
    """Something that a user should know of an adapter."""

    severity: str
    code: str
    message: str


@dataclass(frozen=True)
class AdapterReport:
    """An adapter, module by module; one that holds NaN or infinity has a finding in place of figures."""

    r: int
    modules: list[ModuleReport]
    findings: list[Finding]

    @property
    def suggested_rank(self) -> int:
        """The rank that keeps 99 % of the energy in every module."""
        return max((m.energy_rank_99 for m in self.modules), default=0)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "suggested_rank": self.suggested_rank}


def report_adapter(files: AdapterFiles) -> AdapterReport:
    """Inspect an opened adapter.

    Raises:
        AdapterFileError: a module has only one of its two factors.
    """
    updates = updates_of(files)
    broken = [name for name, update in updates.items() if nonfinite({"A": update.A, "B": update.B})]
    reports = [_module(name, update) for name, update in updates.items() if name not in broken]
    findings = [Finding("error", "not-finite", f"'{name}' holds NaN or infinity") for name in broken]
    if files.config.use_dora:
        said = "these figures are of B·A alone: DoRA also sets the lengths of the rows, for which the base's weights are needed"
        findings.append(Finding("warning", "dora", said))
    return AdapterReport(files.config.r, reports, [*findings, *(f for r in reports for f in _findings(r))])


def _module(name: str, update: LowRank) -> ModuleReport:
    values = singular_values(update)
    return ModuleReport(
        name=name,
        r=update.rank,
        scale=update.scale,
        frobenius_norm=float(values.norm()),
        spectral_norm=float(values[0]),
        stable_rank=stable_rank(values),
        effective_rank=effective_rank(values),
        energy_rank_99=energy_rank(values, 0.99),
    )


def _findings(module: ModuleReport) -> list[Finding]:
    if module.spectral_norm == 0:
        return [Finding("warning", "dead", f"'{module.name}' changes nothing: its update is zero")]
    return []
