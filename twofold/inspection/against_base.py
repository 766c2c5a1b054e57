"""An adapter beside the base that it changes: sizes, amplification, intruders, and whether it fits; one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from twofold.adapter.files import AdapterFiles
from twofold.adapter.parameters import ParameterShape
from twofold.adapter.shapes import ModuleShape
from twofold.adapter.target import adapted_modules
from twofold.adapter.updates import TRANSPOSED, Pair, low_rank, pairs_of, updates_of
from twofold.base.streamed import StreamedBase
from twofold.errors import did_you_mean
from twofold.events import Emit, Progress
from twofold.inspection.lint import Finding
from twofold.lowrank.algebra import bases_of
from twofold.lowrank.beside import Weight, sizes
from twofold.lowrank.factors import LowRank
from twofold.lowrank.intruders import ALIKE, Likeness
from twofold.machine import multiplied_in
from twofold.native.training import native_kernels, why_not

Look: TypeAlias = Callable[[Weight, LowRank], Likeness]
"""From a weight and its update to the likeness of the changed weight's largest directions (`lowrank.intruders`)."""
MATRICES = ("linear", "conv1d", "embedding", "convolution")


@dataclass(frozen=True)
class BesideBase:
    """One update beside its weight W.

    Attributes:
        relative_norm: ‖delta‖_F / ‖W‖_F.
        relative_spectral_norm: the same of spectral norms; that of W is found from below (`lowrank.beside`).
        amplification: how much louder the update's own directions are in it than in W (`lowrank.beside`).
        intruders: how many of the largest directions of W + delta are new; None where that was not asked.
        likeness: of those directions, the largest cosine with one of W's.
    """

    relative_norm: float
    relative_spectral_norm: float
    amplification: float
    intruders: int | None = None
    likeness: list[float] | None = None


@torch.no_grad()
@native_kernels()
def beside_base(
    files: AdapterFiles, shapes: Mapping[str, ModuleShape], base: StreamedBase, look: Look | None, emit: Emit
) -> dict[str, BesideBase]:
    """By name, every update that fits a linear map, a convolution or an embedding of the base.

    Args:
        look: finds how like W's own the largest directions of the changed weight are; None if that is not asked.
    """
    updates = {n: u for n, u in updates_of(files).items() if fits(u, shapes.get(n))}
    found = {}
    following = [*updates, ""][1:]
    for i, (name, update) in enumerate(updates.items(), 1):
        base.expect(f"{following[i - 1]}.weight")
        if update.finite:
            weight = base.read(f"{name}.weight").flatten(1)
            found[name] = _beside(weight.T if shapes[name].kind in TRANSPOSED else weight, update, look)
        emit(Progress(task="reading the base", done=i, total=len(updates)))
    return found


def _beside(weight: Tensor, update: LowRank, look: Look | None) -> BesideBase:
    own = Weight(weight, type_of_products(weight))
    likeness = look(own, update) if look else None
    found = bases_of(update)
    norm = likeness.spectral_norm if likeness and likeness.spectral_norm > float(found.values[:1].sum()) else None
    size = sizes(own, found, norm)
    return BesideBase(
        relative_norm=_share(found.values.norm(), size.frobenius_norm),
        relative_spectral_norm=_share(found.values[0], size.spectral_norm),
        amplification=size.amplification,
        intruders=None if likeness is None else sum(cosine < ALIKE for cosine in likeness.cosines),
        likeness=None if likeness is None else likeness.cosines,
    )


def type_of_products(weight: Tensor) -> torch.dtype:
    """A weight's own type where our kernels can read it; else the one that PyTorch multiplies well."""
    read = weight.stride(-1) == 1 and why_not(weight.dtype, weight.device) is None
    return weight.dtype if read else multiplied_in(weight.dtype, weight.device)


def _share(size: Tensor, of: float) -> float:
    return float(size) / of if of else float("inf")


def fits(update: LowRank, shape: ModuleShape | None) -> bool:
    """Whether the base has such a module, whose weight is one matrix of this shape."""
    return shape is not None and shape.kind in MATRICES and shape.groups == 1 and _wrong(update, shape) is None


def _wrong(update: LowRank, shape: ModuleShape) -> str | None:
    """How an update's shape differs from its module's, if it does."""
    return _differs(update, shape.out_features, shape.in_features) if shape.kind in MATRICES else None


def _misfit(update: LowRank, pair: Pair, shape: ModuleShape, parameter: ParameterShape | None) -> str | None:
    """The same of any pair; what a module's second map is like is not known here."""
    if parameter:
        return _differs(update, parameter.out_features, parameter.in_features)
    return _wrong(update, shape) if pair.name == pair.module else None


def _differs(update: LowRank, out_features: int, in_features: int) -> str | None:
    of_update = (len(update.B), update.A.shape[1])
    if of_update == (out_features, in_features):
        return None
    return f"{of_update[0]} x {of_update[1]} where the base has {out_features} x {in_features}"


def lint_against(files: AdapterFiles, shapes: Mapping[str, ModuleShape]) -> Iterator[Finding]:
    """What does not fit between an adapter and the modules of a base."""
    once = {(pair.place, pair.a): pair for pair in pairs_of(files)}
    for pair in once.values():
        shape = shapes.get(pair.module)
        parameter = next((p for p in shape.own if p.name == pair.parameter), None) if shape else None
        if shape is None:
            said = f"the base has no module '{pair.module}'{did_you_mean(pair.module, shapes)}"
            yield Finding("error", "unmatched-module", said)
        elif pair.parameter and parameter is None:
            said = f"'{pair.module}' of the base has no parameter '{pair.parameter}'"
            yield Finding(
                "error", "unmatched-module", f"{said}{did_you_mean(pair.parameter, [p.name for p in shape.own])}"
            )
        elif wrong := _misfit(low_rank(files, pair), pair, shape, parameter):
            yield Finding("error", "wrong-shape", f"'{pair.name}' is {wrong}")
    held = files.modules()
    for module in adapted_modules(files.config, shapes):
        if module not in held:
            said = f"target_modules names '{module}' of the base, but the file holds nothing for it"
            yield Finding("warning", "target-ignored", said)
