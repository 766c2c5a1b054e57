"""What an adapter is, read off its factors: norms, ranks and energy per module, without a base and without BA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from twofold.adapter.config import resolve
from twofold.adapter.files import AdapterFiles
from twofold.errors import AdapterFileError
from twofold.inspection.experts import placed
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


def updates_of(files: AdapterFiles) -> dict[str, LowRank]:
    """Every update of an adapter, by name: of a module, or of a part of one."""
    return {name: found for module, keys in files.modules().items() for name, found in low_ranks(files, module, keys)}


PARTNERS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
PARTNERS |= {b: a for a, b in PARTNERS.items()}


def low_ranks(files: AdapterFiles, module: str, keys: dict[str, str]) -> Iterator[tuple[str, LowRank]]:
    """The updates of one module with a name each: most have one, attention two, experts one each; trained whole, none."""
    pairs = _pairs(files, module, keys)
    inner_first = sorted(pairs, key=len, reverse=True)
    found = placed(files.config, module, [files.tensors.shapes[pairs[prefix][0]][0] for prefix in inner_first])
    if found is not None:
        for prefix, parameter in zip(inner_first, found, strict=True):
            yield from _of_experts(files, f"{module}.{parameter.name}", parameter.experts, pairs[prefix])
        return
    for prefix, pair in pairs.items():
        name = ".".join([module, *prefix.removesuffix(".").split(".")]) if prefix else module
        yield name, _of_module(files, module, pair)


def _pairs(files: AdapterFiles, module: str, keys: dict[str, str]) -> dict[str, tuple[str, str]]:
    """The keys of A and B of each map of a module, by what stands before their names."""
    found = {}
    for suffix, key in keys.items():
        prefix, mark, rest = suffix.rpartition("lora_")
        partner = PARTNERS.get(mark + rest)
        if partner is None:
            continue
        if prefix + partner not in keys:
            raise AdapterFileError(f"{files.path}: '{module}' has {suffix} without its partner")
        if rest in ("A.weight", "embedding_A"):
            found[prefix] = (key, keys[prefix + partner])
    return found


def _of_module(files: AdapterFiles, module: str, pair: tuple[str, str]) -> LowRank:
    a, b = (_read(files, key).flatten(1) for key in pair)
    if len(a) != b.shape[1]:  # a convolution with groups: each group of outputs has its own part of the rank
        b = torch.block_diag(*b.chunk(len(a) // b.shape[1]))
    return LowRank(a, b, resolve(files.config, module).scale)


def _of_experts(
    files: AdapterFiles, parameter: str, experts: int, pair: tuple[str, str]
) -> Iterator[tuple[str, LowRank]]:
    """An update for each expert, whose ranks lie side by side in a file; of one map, by the parameter's own name."""
    a, b = (_read(files, key) for key in pair)
    r, _, scale = resolve(files.config, parameter)
    for e, inside in enumerate(a.chunk(experts)):
        name = parameter if experts == 1 else f"{parameter}[{e}]"
        yield name, LowRank(inside, b.view(len(b), r, experts)[:, :, e], scale)


def _read(files: AdapterFiles, key: str) -> Tensor:
    return files.tensors.read(key)


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
