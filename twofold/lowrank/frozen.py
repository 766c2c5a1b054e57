"""How a frozen weight multiplies: as the matrix it is, or from a form of its own, such as one of four bits."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Frozen(Protocol):
    """A weight (out, in) that is not kept as a matrix, and what a low-rank update needs of it."""

    @property
    def shape(self) -> torch.Size: ...

    def product(self, x: Float[Tensor, "rows in_"], bias: Tensor | None) -> Float[Tensor, "rows out"]:
        """x Wᵀ + b, in x's type."""
        ...

    def input_gradient(self, dy: Float[Tensor, "rows out"]) -> Float[Tensor, "rows in_"]:
        """dy W, in dy's type."""
        ...


def product(
    weight: Tensor | Frozen, x: Float[Tensor, "rows in_"], bias: Tensor | None = None
) -> Float[Tensor, "rows out"]:
    """x Wᵀ + b."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight.product(x, bias)


def product_gradient(
    weight: Tensor | Frozen, dy: Float[Tensor, "rows out"], onto: Float[Tensor, "rows in_"] | None = None
) -> Float[Tensor, "rows in_"]:
    """dy W, added in place to `onto` where there is such a sum already."""
    if isinstance(weight, Tensor):
        return dy @ weight if onto is None else onto.addmm_(dy, weight)
    found = weight.input_gradient(dy)
    return found if onto is None else onto.add_(found)
