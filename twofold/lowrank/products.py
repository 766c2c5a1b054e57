"""Products with frozen weights, and sums of them: the matrix a weight is, or a form of its own, such as one of four bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from twofold.replaceable import replaceable


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


class Term(NamedTuple):
    """scale · x Wᵀ for a weight (out, in); scale · x W where it is read as it stands, (in, out)."""

    x: Float[Tensor, "rows _"]
    weight: Tensor | Frozen
    as_read: bool = False
    scale: float = 1.0


@replaceable
def sum_of_products(
    terms: Sequence[Term], bias: Float[Tensor, " out"] | None = None, onto: Float[Tensor, "rows out"] | None = None
) -> Float[Tensor, "rows out"]:
    """The sum of the terms, of a bias, and of what they come on top of."""
    first, *rest = terms
    total = _product(first, bias)
    for x, weight, as_read, scale in rest:
        if isinstance(weight, Tensor):
            total.addmm_(x, weight if as_read else weight.T, alpha=scale)
        else:
            total.add_(_product(Term(x, weight, as_read)), alpha=scale)
    return total if onto is None else total.add_(onto)


def _product(term: Term, bias: Tensor | None = None) -> Tensor:
    x, weight, as_read, scale = term
    if not isinstance(weight, Tensor):
        found = weight.input_gradient(x) if as_read else weight.product(x, bias)
    else:
        found = x @ weight if as_read else F.linear(x, weight, bias)
    return found if scale == 1 else found.mul_(scale)


@replaceable
def crossed(left: Float[Tensor, "rows m"], right: Float[Tensor, "rows n"], scale: float = 1.0) -> Float[Tensor, "m n"]:
    """scale · leftᵀ right, in their type or a wider one: the gradient of a factor. The wider of the two is streamed through."""
    found = left.T @ right if left.shape[1] <= right.shape[1] else (right.T @ left).T
    return found if scale == 1 else found.mul_(scale)
