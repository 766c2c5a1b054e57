"""A model with every weight in a wider type, one operation at a time: no weight is touched, and none is held twice.

Converting a whole model takes up to three times its memory. PyTorch asks a `TorchFunctionMode` about every operation that
Python code calls, so inside a `with Widened(...)` block an operation that is given a parameter gets a wider copy of it, which
goes when the operation is done. That reaches a weight wherever it is used: in fused paths, tied, read by a parent module,
and where code asks a weight for its type. Two operations take weights too large to copy. A look-up takes its
rows first and widens those, which is the same since it rounds nothing; a linear map goes through slices of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

WIDE_ELEMENTS = 1 << 23
"""Values of a large weight that are wide at once: 64 MiB in float64."""

_DTYPE, _DEVICE = torch.Tensor.dtype.__get__, torch.Tensor.device.__get__  # type: ignore[attr-defined]


class Widened(TorchFunctionMode):
    """For the length of a `with` block, parameters enter operations in `dtype` or their own wider one, on `device`.

    Tensors that are no parameters stay what they are, as they would had the model been converted: code that asks for
    float32 by name gets float32. Meant for forward passes alone, under `no_grad`.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype, self.device = dtype, device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """PyTorch's door: called for every operation, with this mode switched off meanwhile."""
        named = kwargs or {}
        if function is in_own_precision:
            return nn.Parameter(function(*args), requires_grad=False)
        if getattr(function, "__name__", "") == "__get__" and isinstance(args[0], nn.Parameter):
            return self._asked(function, args[0])
        if function is F.embedding and _takes_weight(args):
            ids, table, *rest = args
            return self._wide(F.embedding(ids.to(table.device), table, *rest, **named))
        if function is F.linear and _takes_weight(args):
            return self._linear(*args, **named)
        return function(*self._given(args), **{key: self._given(value) for key, value in named.items()})

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self._type(tensor.dtype))

    def _type(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, self.dtype) if dtype.is_floating_point else dtype

    def _asked(self, getter: Any, parameter: nn.Parameter) -> Any:
        """An attribute, such as `weight.dtype` or `weight.T`, as that of the wider weight."""
        if getter == _DEVICE:
            return self.device
        found = getter(parameter)
        if getter == _DTYPE:
            return self._type(found)
        return self._wide(found) if isinstance(found, Tensor) else found

    def _given(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return self._wide(value)
        return type(value)(map(self._given, value)) if type(value) in (list, tuple) else value

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = max(1, WIDE_ELEMENTS // weight.shape[1])
        if weight.shape[0] <= rows:
            return F.linear(x, self._wide(weight), self._given(bias))
        y = torch.cat([F.linear(x, self._wide(part)) for part in weight.split(rows)], dim=-1)
        return y if bias is None else y.add_(self._wide(bias))


def _takes_weight(args: Any) -> bool:
    """Whether an operation's second operand is a stored weight."""
    return len(args) > 1 and isinstance(args[1], nn.Parameter)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring what is no parameter, and small, to the device that `Widened` brings parameters to."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def in_own_precision(make: Callable[[], Tensor], source: Tensor) -> Tensor:
    """A weight that `make` forms from stored ones (`source` is one), in their own precision even inside of `Widened`.

    There it is taken for a parameter from then on, so that what is formed is what would be stored, and widened when used.
    """
    if has_torch_function((source,)):
        made: Tensor = handle_torch_function(in_own_precision, (source,), make, source)
        return made
    return make()
