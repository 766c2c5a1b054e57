"""Two adapters side by side, from their factors: how alike their updates are, and the spaces they act in."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from twofold.adapter.files import AdapterFiles
from twofold.adapter.updates import updates_of
from twofold.adapter.whole import whole_names
from twofold.errors import ConfigError
from twofold.lowrank.algebra import inner, leading, norm
from twofold.lowrank.factors import LowRank
from twofold.lowrank.spectra import subspace_similarity

DIRECTIONS = 8
"""How many of the largest singular directions are set against each other, one number more at a time."""


@dataclass(frozen=True)
class ModuleComparison:
    """One module's update in both adapters.

    Attributes:
        cosine: of the deltas as vectors: 1 for the same direction, 0 for unrelated ones, -1 for opposite ones.
        norms: Frobenius, of both.
        output_similarity: phi[i][j] of the i+1 and j+1 largest left singular directions (`subspace_similarity`), from 0 to 1.
        input_similarity: the same of right singular directions. After training from one seed it is partly the start's.
        output_baseline, input_baseline: what phi of all directions shown would be on average if one space were drawn at random.
    """

    name: str
    cosine: float
    norms: tuple[float, float]
    output_similarity: list[list[float]]
    input_similarity: list[list[float]]
    output_baseline: float
    input_baseline: float


@dataclass(frozen=True)
class Comparison:
    """Two adapters, module by module where both change it.

    Attributes:
        cosine: of all deltas together.
        only_first, only_second: modules that one of them leaves alone.
        whole: tensors that are no factors (modules trained whole, biases, tokens) and differ, or that one of them alone has.
        config: settings that differ, by name, with both values.
    """

    cosine: float
    modules: list[ModuleComparison]
    only_first: list[str]
    only_second: list[str]
    whole: list[str]
    config: dict[str, tuple[Any, Any]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_adapters(first: AdapterFiles, second: AdapterFiles) -> Comparison:
    """Compare two opened adapters.

    Raises:
        ConfigError: they change no module in common, or one whose shapes differ, or one is DoRA.
    """
    for files in (first, second):
        if files.config.use_dora:
            raise ConfigError(
                f"{files.path} is DoRA, which changes the lengths of the weight's rows beside B·A, so that its update cannot be "
                "compared without the base's weights; twofold inspect describes its B·A alone"
            )
    a, b = updates_of(first), updates_of(second)
    common = [name for name in a if name in b]
    if not common:
        raise ConfigError(f"{first.path} and {second.path} change no module in common, so there is nothing to compare")
    modules = [_compared(name, a[name], b[name]) for name in common]
    only_first, only_second = [n for n in a if n not in b], [n for n in b if n not in a]
    together = sum(m.cosine * m.norms[0] * m.norms[1] for m in modules)
    sizes = [
        math.hypot(*(m.norms[i] for m in modules), *(norm(updates[n]) for n in alone))
        for i, (updates, alone) in enumerate(((a, only_first), (b, only_second)))
    ]
    return Comparison(
        cosine=_ratio(together, sizes[0] * sizes[1]),
        modules=modules,
        only_first=only_first,
        only_second=only_second,
        whole=_differing_whole(first, second),
        config=_differences(first, second),
    )


def _compared(name: str, a: LowRank, b: LowRank) -> ModuleComparison:
    if (a.B.shape[0], a.A.shape[1]) != (b.B.shape[0], b.A.shape[1]):
        shapes = " and ".join(f"{u.B.shape[0]} x {u.A.shape[1]}" for u in (a, b))
        raise ConfigError(f"'{name}' is {shapes}: the adapters were trained on different bases")
    in_a, in_b = leading(a, DIRECTIONS), leading(b, DIRECTIONS)
    most = max(in_a.U.shape[1], in_b.U.shape[1])
    return ModuleComparison(
        name=name,
        cosine=_ratio(inner(a, b), in_a.norm * in_b.norm),
        norms=(in_a.norm, in_b.norm),
        output_similarity=subspace_similarity(in_a.U, in_b.U).tolist(),
        input_similarity=subspace_similarity(in_a.V, in_b.V).tolist(),
        output_baseline=most / a.B.shape[0],
        input_baseline=most / a.A.shape[1],
    )


def _differing_whole(first: AdapterFiles, second: AdapterFiles) -> list[str]:
    names = whole_names(first) | whole_names(second)
    return [f"{module}.{suffix}" for module, suffix in sorted(names) if not _same(first, second, module, suffix)]


def _same(first: AdapterFiles, second: AdapterFiles, module: str, suffix: str) -> bool:
    keys = [files.modules().get(module, {}).get(suffix) for files in (first, second)]
    a, b = (files.tensors.read(key) if key else None for files, key in zip((first, second), keys, strict=True))
    return a is not None and b is not None and torch.equal(a, b)


def _ratio(value: float, scale: float) -> float:
    return value / scale if scale > 0 else 0.0


def _differences(first: AdapterFiles, second: AdapterFiles) -> dict[str, tuple[Any, Any]]:
    pairs = {f.name: (getattr(first.config, f.name), getattr(second.config, f.name)) for f in fields(first.config)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
