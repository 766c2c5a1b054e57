"""The parameters inside a module, as targets see them: which are maps that can be adapted, and which are shared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParameterShape:
    """A parameter of two or three dimensions: a map from `in_features` to `out_features` for each of its `experts`.

    Attributes:
        transposed: whether it lies as (experts, in, out) rather than (experts, out, in).
    """

    name: str
    experts: int
    in_features: int
    out_features: int
    transposed: bool = False

    @property
    def parameters_per_rank(self) -> int:
        """Values of A and B per unit of rank."""
        return self.experts * (self.in_features + self.out_features)


def own_parameters(module: nn.Module) -> tuple[ParameterShape, ...]:
    """Its parameters of two and three dimensions, those of modules inside it aside, in its order."""
    if not module._parameters:
        return ()
    transposed = bool(module.__dict__.get("is_transposed", getattr(type(module), "is_transposed", False)))
    found = []
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() in (2, 3):
            *stack, rows, columns = parameter.shape
            experts, swapped = math.prod(stack), transposed and bool(stack)
            widths = (rows, columns) if swapped else (columns, rows)
            found.append(ParameterShape(name, experts, *widths, swapped))
    return tuple(found)


def ties_of(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """By name, the first module with the same weight."""
    first: dict[int, str] = {}
    found = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None and first.setdefault(id(weight), name) != name:
            found[name] = first[id(weight)]
    return found
