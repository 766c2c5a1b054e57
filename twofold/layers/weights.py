"""Layers whose shares can be folded into weights of their own, beside the base's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from twofold.functional.widen import in_own_precision
from twofold.layers.protocol import AdapterLayer


class WeightLayer(AdapterLayer):
    """A layer whose shares can be folded into the one weight of its base.

    Attributes:
        merged: that weight, while the layer is merged.
    """

    merged: Tensor | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self._buffers["merged"] = None
        self._non_persistent_buffers_set.add("merged")

    def is_merged(self) -> bool:
        return self._buffers["merged"] is not None

    def fold(self) -> Tensor:
        """A new weight with the active updates in it, rounded once to the base's type."""
        raise NotImplementedError

    def merge(self) -> None:
        self.merged = self.fold()

    def unmerge(self) -> None:
        self.merged = None

    def _merged_now(self) -> Tensor:
        return self.fold() if self.merged is None else self.merged


class WeightsLayer(AdapterLayer):
    """A layer whose shares can be folded into several weights of its base, which runs its own forward on them then.

    Attributes:
        merged: those weights by name, while the layer is merged.
    """

    merged: dict[str, Tensor] | None = None

    def is_merged(self) -> bool:
        return self.merged is not None

    def changed(self) -> list[str]:
        """Names of the base's parameters that the active shares change."""
        raise NotImplementedError

    def fold(self, name: str) -> Tensor:
        """A new value of one of them with the active updates in it, rounded once to the base's type."""
        raise NotImplementedError

    def folded(self) -> dict[str, Tensor]:
        return {name: self.fold(name) for name in self.changed()}

    def merge(self) -> None:
        self.merged = self.folded()

    def unmerge(self) -> None:
        self.merged = None

    def run_merged(self, *args: Any, **named: Any) -> Any:
        """The base's forward on the merged weights, which are kept, or formed for this pass alone."""
        weights = self.merged or {
            name: in_own_precision(partial(self.fold, name), self.base.get_parameter(name)) for name in self.changed()
        }
        return torch.func.functional_call(self.base, weights, args, named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Merged weights move and change their type with the model."""
        if self.merged is not None:
            self.merged = {name: fn(tensor) for name, tensor in self.merged.items()}
        return super()._apply(fn, recurse)
