"""Parameters whose values the engine has taken over: it keeps each weight once, in the form in which it multiplies.

The model goes on as it was: its parameters have their shapes and types, and wherever their values are asked for, they are unpacked
and then pass. An embedding unpacks the rows that it looks up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from twofold.errors import RunError
from twofold.machine import page_out

Rows = Callable[[Int[Tensor, " n"]], Float[Tensor, "n in_"]]
"""Some rows of a matrix, new each time."""


class Given(Tensor):
    """A matrix (out, in) that is kept elsewhere, which a parameter stands for."""

    kept: Rows
    _is_param: bool

    @classmethod
    def of(cls, original: Tensor, kept: Rows) -> Given:
        """In place of a frozen parameter."""
        nothing = torch.empty(1, dtype=original.dtype, device=original.device)
        made: Given = nothing.expand(original.shape).as_subclass(cls)
        made.kept, made._is_param = kept, True
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """PyTorch's door: called for every operation that such a parameter takes part in."""
        named = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in ASKED:
                return function(*args, **named)
            if function is F.embedding and len(args) > 1 and isinstance(args[1], Given):
                return _looked_up(*args)
            if args and isinstance(args[0], Given) and _writes(function):
                raise RunError("this model's weights were given to an engine, so they cannot be written; load it anew")
            return function(*_filled(args), **{key: _filled(value) for key, value in named.items()})


ASKED = {
    getattr(Tensor, n).__get__
    for n in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "requires_grad",
        "is_cuda",
        "layout",
        "nbytes",
        "is_leaf",
        "grad_fn",
        "grad",
    )
}
ASKED |= {Tensor.dim, Tensor.size, Tensor.is_floating_point, Tensor.numel, Tensor.element_size, Tensor.__len__}
"""What is answered without the values."""


def _writes(function: Any) -> bool:
    name = function.__name__
    return name == "__set__" or (name.endswith("_") and not name.startswith("__"))


def _looked_up(ids: Tensor, weight: Given, *_: Any) -> Tensor:
    return weight.kept(ids.flatten()).view(*ids.shape, weight.shape[1])


def _filled(value: Any) -> Any:
    if isinstance(value, Given):
        return value.kept(torch.arange(len(value)))
    return type(value)(map(_filled, value)) if type(value) in (list, tuple) else value


class Owners:
    """Where in a model each parameter is, so that it can be given away everywhere at once."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._places.setdefault(id(parameter), []).append((module, name))

    def give(self, original: Tensor, kept: Rows) -> None:
        """From now on `kept` has the values of this parameter; its memory is free with the caller's last reference.

        A tensor that is none of the model's parameters is let be.
        """
        places: Sequence[tuple[nn.Module, str]] = self._places.pop(id(original), ())
        if not places:
            return
        page_out(original)
        given = Given.of(original, kept)
        for module, name in places:
            module._parameters[name] = given  # type: ignore[assignment]
