"""A tensor that stands for W + scale · L R without holding it.

Stacked weights of experts (E, out, in) are used inside a module's own forward: it takes an expert's slice and multiplies by
it, or hands the whole stack to one grouped product. PEFT forms W + B A for every expert before each pass. Here the module is
given this tensor instead. It looks like W (shape, type, device), and PyTorch asks it about each operation it meets
(`__torch_function__`). Slices and transposes of it are of its kind again; a product with it is two skinny products beside
the one with W:

    x (W + L R) = x W + (x L) R        (W + L R) x = W x + L (R x)

for one matrix, a batch of them and a grouped product alike. Any other operation gets the sum, formed in that moment: what is not
known here costs memory, never correctness. Gradients reach L and R through these products; W is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RANKS = 8
"""Values of 16 bits in 16 bytes."""


@dataclass(frozen=True)
class Sum:
    """W (..., m, n) and the factors L (..., m, r) and R (..., r, n), the scale in one of them."""

    weight: Tensor
    left: Tensor
    right: Tensor

    def formed(self) -> Tensor:
        """The sum itself, in W's type."""
        return self.weight + (self.left @ self.right).to(self.weight.dtype)

    def at(self, index: Any) -> Sum:
        """Of some of the stacked matrices."""
        return Sum(self.weight[index], self.left[index], self.right[index])

    def turned(self) -> Sum:
        """Each matrix transposed."""
        return Sum(self.weight.mT, self.right.mT, self.left.mT)

    def aligned(self) -> Sum:
        """The same with a rank that grouped products take, whose rows must begin every 16 bytes."""
        missing = -self.left.shape[-1] % RANKS
        return Sum(self.weight, F.pad(self.left, (0, missing)), F.pad(self.right, (0, 0, 0, missing)))

    def times(self, product: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """product(x, W + L R), for a product that is linear and takes matrices on its right."""
        w, left, right = (t.to(x.dtype) for t in (self.weight, self.left, self.right))
        return product(x, w) + product(product(x, left), right)

    def of(self, product: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """product(W + L R, x), for a product that takes matrices on its left."""
        w, left, right = (t.to(x.dtype) for t in (self.weight, self.left, self.right))
        return product(w, x) + product(left, product(right, x))


class StandIn(Tensor):
    """W as a tensor, with a `Sum` in its place wherever it is used."""

    stands_for: Sum

    @classmethod
    def of(cls, found: Sum) -> Tensor:
        """A tensor in place of a sum; the sum itself where W is a tensor of a kind of its own, such as a sharded one."""
        if type(found.weight) not in (Tensor, torch.nn.Parameter):
            return found.formed()
        made: StandIn = found.weight.detach().as_subclass(cls)
        made.stands_for = found
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """PyTorch's door: called for every operation that a stand-in takes part in."""
        named = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in ASKED:
                return function(*args, **named)
            known = KNOWN.get(function)
            found = NotImplemented if known is None else known(function, *args, **named)
            if found is NotImplemented:
                return function(*_formed(args), **{key: _formed(value) for key, value in named.items()})
        return StandIn.of(found) if isinstance(found, Sum) else found


def _formed(value: Any) -> Any:
    if isinstance(value, StandIn):
        return value.stands_for.formed().to(value.dtype)
    return type(value)(map(_formed, value)) if type(value) in (list, tuple) else value


def _index(function: Any, stack: Any, index: Any) -> Any:
    """Along the first of three dimensions: the experts."""
    return stack.stands_for.at(index) if stack.dim() == 3 and isinstance(index, int | Tensor) else NotImplemented


def _transpose(function: Any, stack: Any, one: int, other: int) -> Any:
    dimensions = {one % stack.dim(), other % stack.dim()}
    return stack.stands_for.turned() if dimensions == {stack.dim() - 2, stack.dim() - 1} else NotImplemented


def _turn(function: Any, stack: Any) -> Any:
    return stack.stands_for.turned()


def _linear(function: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(x, StandIn) or isinstance(bias, StandIn) or not isinstance(weight, StandIn):
        return NotImplemented
    y = weight.stands_for.turned().times(torch.matmul, x)
    return y if bias is None else y + bias


def _product(function: Any, one: Any, other: Any) -> Any:
    if isinstance(one, StandIn) and isinstance(other, StandIn):
        return NotImplemented
    return one.stands_for.of(function, other) if isinstance(one, StandIn) else other.stands_for.times(function, one)


def _grouped(function: Any, x: Any, weight: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows of x in groups, one matrix of the stack for each."""
    if isinstance(x, StandIn) or bias is not None or out_dtype is not None:
        return NotImplemented
    return weight.stands_for.aligned().times(lambda rows, matrices: function(rows, matrices, offs=offs), x)


ASKED = {getattr(Tensor, n).__get__ for n in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")}
ASKED |= {Tensor.dim, Tensor.size, Tensor.is_floating_point, Tensor.numel, Tensor.data_ptr, Tensor.__len__}
"""What W itself answers."""
KNOWN: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _index,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.mT.__get__: _turn,  # type: ignore[attr-defined]
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), _product),
    **dict.fromkeys([f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f], _grouped),
}
"""What is answered without forming the sum, or with NotImplemented where it must be."""
