"""A full fine-tune as an adapter: the best low-rank updates of what its weights changed by, one module at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import Tensor

from twofold.adapter.shapes import ModuleShape
from twofold.adapter.updates import TRANSPOSED, Pair
from twofold.errors import ConfigError
from twofold.events import Emit, Progress
from twofold.lowrank.algebra import Reduced, factored, factored_to_energy
from twofold.lowrank.factors import LowRank

Read: TypeAlias = Callable[[str], Tensor]
"""From a parameter's name to its values."""
ReadMatrices: TypeAlias = Callable[[str], Iterable[Tensor]]
"""The same, of a parameter of three dimensions one matrix after the other."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How much of a change to keep.

    Attributes:
        r: rank of every module; or
        energy: the share of the squared Frobenius norm that every module keeps, at the smallest rank that does.
        exact: decompose every difference whole, in float64, instead of sampling it, whose error is within a per cent of the
            smallest one.
    """

    r: int | None = None
    energy: float | int | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if (self.r is None) == (self.energy is None):
            raise ConfigError("say one of --r and --energy")
        if self.r is not None and self.r < 1:
            raise ConfigError(f"the rank is {self.r}, but must be at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"energy is {self.energy}, but must be above 0 and at most 1, as in 0.9")

    def of(self, delta: Tensor) -> Reduced:
        """The update that is kept of a difference."""
        if self.r is not None:
            return factored(delta, self.r, exact=self.exact)
        return factored_to_energy(delta, self.energy or 1.0, exact=self.exact)


@dataclass(frozen=True)
class Extracted:
    """One module: rank of its update, Frobenius norm of the whole change, and the share of its energy that the rank lost."""

    name: str
    r: int
    norm: float
    lost: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def pair_of(name: str, shape: ModuleShape) -> Pair:
    """Where an adapter keeps the factors of a module."""
    if shape.kind == "embedding":
        return Pair(name, name, "lora_embedding_A", "lora_embedding_B")
    return Pair(name, name, "lora_A.weight", "lora_B.weight")


def stored_shapes(shape: ModuleShape, weight: torch.Size) -> tuple[torch.Size, torch.Size]:
    """How A and B of a module with this weight lie in a file, their rank aside."""
    if shape.kind in TRANSPOSED:
        return torch.Size([1, weight[0]]), torch.Size([weight[1], 1])
    return torch.Size([1, *weight[1:]]), torch.Size([weight[0], 1, *(1 for _ in weight[2:])])


@torch.no_grad()
def extracted_updates(
    base: Read, tuned: Read, targets: Mapping[str, ModuleShape], how: Extraction, emit: Emit
) -> Iterator[tuple[Pair, LowRank, Extracted]]:
    """The update of every target that changed, and what it lost.

    Raises:
        ConfigError: a module's update is no one product, it has another shape in the fine-tune, or holds NaN or infinity.
    """
    _check(targets)
    for i, (name, shape) in enumerate(targets.items(), 1):
        delta = difference(weight := f"{name}.weight", base(weight), tuned(weight)).flatten(1)
        norm = _norm(weight, delta)
        if norm > 0:
            found = how.of(delta.T.contiguous() if shape.kind in TRANSPOSED else delta)
            yield pair_of(name, shape), found.update, Extracted(name, found.update.rank, norm, found.lost)
        emit(Progress(task="extracting modules", done=i, total=len(targets)))


def difference(name: str, before: Tensor, after: Tensor) -> Tensor:
    """What a parameter changed by, in at least float32.

    Raises:
        ConfigError: it has another shape in the fine-tune.
    """
    if before.shape != after.shape:
        shapes = " and ".join(" x ".join(map(str, t.shape)) for t in (before, after))
        raise ConfigError(f"'{name}' is {shapes}: this is no fine-tune of that base, or its vocabulary was resized")
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    return after.to(dtype) - before.to(dtype)


def _norm(name: str, delta: Tensor) -> float:
    norm = float(delta.norm(dtype=torch.float64))
    if not math.isfinite(norm):
        raise ConfigError(
            f"'{name}' holds NaN or infinity in the base or in the fine-tune, so nothing tells what it changed by"
        )
    return norm


@torch.no_grad()
def left_out(base: ReadMatrices, tuned: ReadMatrices, names: Iterable[str]) -> dict[str, float]:
    """By name, the norm of what parameters changed by that get no update, for those that did change.

    Raises:
        ConfigError: one has another shape in the fine-tune, or holds NaN or infinity.
    """
    found = {}
    for name in names:
        pairs = zip_longest(base(name), tuned(name), fillvalue=torch.empty(0))
        found[name] = math.hypot(*(_norm(name, difference(name, before, after)) for before, after in pairs))
    return {name: norm for name, norm in found.items() if norm > 0}


def _check(targets: Mapping[str, ModuleShape]) -> None:
    refused = [n for n, s in targets.items() if s.kind == "attention" or s.groups > 1]
    if refused:
        raise ConfigError(
            f"the change of '{refused[0]}' is no one product of two factors; leave it out of --target-modules"
        )
