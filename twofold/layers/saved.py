"""Modules that are trained whole (`modules_to_save`), and biases trained on their own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from twofold.errors import ConfigError
from twofold.layers.protocol import AdapterLayer, Share, bias_of
from twofold.layers.quantised import frozen_of


class CopyShare(Share):
    """An adapter's own trainable copy of a whole module, in float32 or wider."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if any(frozen_of(m) is not None for m in base.modules()):
            raise ConfigError(
                "a module in modules_to_save is quantised, and codes cannot be trained; take it into target_modules, or load "
                "the base without quantization"
            )
        dtype = torch.promote_types(next(base.parameters()).dtype, torch.float32)
        self.module = copy.deepcopy(base).to(dtype).requires_grad_(True)

    def saved(self, base: nn.Module) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    @torch.no_grad()
    def load(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(tensors)


class TrainedCopy(AdapterLayer):
    """The active adapter's copy runs in place of the base; one at a time, for copies do not add up."""

    @classmethod
    def from_base(cls, base: nn.Module) -> TrainedCopy:
        return cls(base)

    def forward(self, *args: Any, **named: Any) -> Any:
        """As the base's, in the copy's type; what comes out is in the type of what went in, or of the base."""
        shares = self.active()
        if not shares:
            return self.base(*args, **named)
        module = cast(CopyShare, shares[-1]).module
        given = (*args, *named.values())
        floating = [v.dtype for v in given if isinstance(v, Tensor) and v.is_floating_point()]
        own, wide = (next(m.parameters()).dtype for m in (self.base, module))
        found = module(*_cast(args, wide), **{n: _cast(v, wide) for n, v in named.items()})
        return _cast(found, (floating or [own])[0])

    def merge(self) -> None:
        """The copy already is a weight of its own."""

    def unmerge(self) -> None:
        """Nothing was folded."""

    def folded(self) -> dict[str, Tensor]:
        """What the active share saves, in the base's types."""
        types = {key: tensor.dtype for key, tensor in self.base.state_dict().items()}
        return {key: t.to(types[key]) for share in self.active()[-1:] for key, t in share.saved(self.base).items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors of a value, or of a tuple of values, in another type."""
    if isinstance(value, tuple):
        return tuple(_cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class BiasShare(Share):
    """What an adapter adds to a bias, zero at the start, if it adds to one; saved as the bias it results in.

    Attributes:
        bias_key: PEFT's suffix of that bias.
    """

    bias_key = "bias"

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias_change = None if bias is None else nn.Parameter(_no_change(bias))

    def saved(self, base: nn.Module) -> dict[str, Tensor]:
        change = self.bias_change
        return {} if change is None else {self.bias_key: bias_of(base) + change.detach()}

    @torch.no_grad()
    def load(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        if self.bias_change is not None:
            self.bias_change.copy_(tensors[self.bias_key].to(self.bias_change) - bias_of(base))


def _no_change(bias: Tensor) -> Tensor:
    return torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))


def shifted(y: Tensor, shares: Iterable[BiasShare]) -> Tensor:
    """An output with what the shares add to its bias."""
    for share in shares:
        if share.bias_change is not None:
            y = y + (share.bias_change * share.weight_when_active).to(y.dtype)
    return y


def shifted_bias(base: nn.Module, shares: Iterable[BiasShare]) -> Tensor:
    """The bias itself with it, rounded once to its type."""
    bias = bias_of(base)
    return shifted(bias.to(torch.promote_types(bias.dtype, torch.float32)), shares).to(bias.dtype)


class TrainedBias(AdapterLayer):
    """A module without factors whose bias alone is trained (`bias: all`): its output shifted by the change."""

    @classmethod
    def from_base(cls, base: nn.Module) -> TrainedBias:
        return cls(base)

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        return shifted(self.base(x, *args, **named), cast(list[BiasShare], self.active()))

    def merge(self) -> None:
        """Nothing to fold: the change is added, not multiplied."""

    def unmerge(self) -> None:
        """Nothing was folded."""

    def folded(self) -> dict[str, Tensor]:
        return {"bias": shifted_bias(self.base, cast(list[BiasShare], self.active())).detach()}
