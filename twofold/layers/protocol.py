"""What every adapted layer is: a frozen base module and the shares that adapters hold in it.

An adapter's *share* of a layer is a module of its own, which knows its name, its weight while active and its tensors.
Whoever needs the adapters of a model asks its layers; nothing is found by looking for letters in names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from twofold.errors import ConfigError
from twofold.functional.widen import in_own_precision


class Share(nn.Module):
    """One adapter's part of one layer.

    Attributes:
        weight_when_active: the factor its contribution is multiplied by; 0.0 while it is not active.
        origin: the configuration that it was made from, for whoever saves it.
    """

    weight_when_active: float = 0.0
    origin: object = None

    def saved(self, base: nn.Module) -> dict[str, Tensor]:
        """The tensors of its file, by PEFT's suffix after the module's path."""
        raise NotImplementedError

    def plain(self, base: nn.Module) -> dict[str, Tensor]:
        """The tensors of a file that says the same as a plain update of the base, whatever this share was made from."""
        return self.saved(base)

    def load(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of `saved` back; names and shapes were checked before."""
        raise NotImplementedError


class AdapterLayer(nn.Module):
    """A frozen `base` module and its `shares`, by adapter name.

    Attributes:
        enabled: False runs the base alone.
        folding: True runs on a merged weight that is formed for each pass and not kept.
    """

    base: nn.Module
    shares: nn.ModuleDict
    enabled: bool
    folding: bool

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.shares = nn.ModuleDict()
        self.enabled, self.folding = True, False
        self.training = base.training

    def add(self, name: str, share: Share) -> None:
        """Hold one more adapter's share, not active yet."""
        if name in self.shares:
            raise ConfigError(f"an adapter named '{name}' is attached already; detach it or choose another name")
        share.train(self.training)
        self.shares[checked_name(name)] = share

    def active(self) -> list[Share]:
        """The shares that contribute now."""
        return [s for s in self._shares() if s.weight_when_active != 0] if self.enabled else []

    def _shares(self) -> Iterator[Share]:
        for share in self.shares.values():
            if isinstance(share, Share):
                yield share

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that looks at a layer's dtype, device or ties."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def __getattr__(self, name: str) -> Any:
        """What the layer has no word for it answers as its base: a model may ask a layer for its stride or its number of heads."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base, name)

    def merge(self) -> None:
        """Fold the active shares into a new weight beside the base's, which stays as it is."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Drop the folded weight: the base's own bits serve again."""
        raise NotImplementedError

    def folded(self) -> dict[str, Tensor]:
        """The base's tensors that the active shares change, as changed, by their names in the base and in its types.

        Raises:
            ConfigError: no tensor of the base can hold the change.
        """
        raise NotImplementedError


class WeightLayer(AdapterLayer):
    """A layer whose shares can be folded into the one weight of its base.

    Attributes:
        merged: that weight, while the layer is merged.
    """

    merged: Tensor | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.register_buffer("merged", None, persistent=False)

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


def checked_name(name: str) -> str:
    """`name` if an adapter may bear it.

    Raises:
        ConfigError: it holds characters that files and requests cannot carry, or is a word of the container itself.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_@-]*", name) or hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"'{name}' cannot name an adapter: use letters, digits, '_', '-' and '@', as in 'my-adapter'")
    return name


def bias_of(module: nn.Module) -> Tensor:
    """The bias of a module that has one."""
    bias: Tensor = module.bias  # type: ignore[assignment]
    return bias
