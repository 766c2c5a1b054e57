"""What every adapted layer is: a frozen base module and the shares that adapters hold in it.

An adapter's *share* of a layer is a module of its own, which knows its name and its tensors. Which adapters count now is said
once for a whole model, in the `Adapters` that all of its layers and shares refer to: choosing others touches the shares of those
alone, and a forward pass looks at the active ones, however many are loaded.
Whoever needs the adapters of a model asks its layers; nothing is found by looking for letters in names.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from twofold.errors import ConfigError
from twofold.layers.rows import Rows, in_other_order, not_rows


class Adapters:
    """What the layers of one model share: the adapters there are, and which of them count now.

    Attributes:
        held: the shares of each adapter, in the order the adapters came.
        weights: what the contribution of each chosen adapter is multiplied by; at 0 it does not count, but may learn.
        enabled: False runs the base alone.
        folding: True runs on merged weights that are formed for each pass and not kept.
        rows: the adapters of each row of the batch, in place of `weights`; None: `weights` for all.
    """

    rows: Rows | None = None

    def __init__(self) -> None:
        self.held: dict[str, list[Share]] = {}
        self.weights: dict[str, float] = {}
        self.enabled, self.folding = True, False

    def activate(self, weights: Mapping[str, float]) -> None:
        """Let these adapters count and learn, and no others."""
        for name in self.weights.keys() | weights.keys():
            for share in self.held.get(name, ()):
                share.requires_grad_(name in weights)
        known = [name for name in weights if name in self.held]
        in_order = known if len(known) < 2 else [name for name in self.held if name in weights]
        self.weights = {name: weights[name] for name in in_order}

    def join(self, layers: Iterable[AdapterLayer]) -> None:
        """Be the one that these layers refer to; what they held and had chosen stays so."""
        for layer in layers:
            if layer.adapters is not self:
                self.weights |= {n: w for n, w in layer.adapters.weights.items() if n in layer.shares}
                for name, share in layer.by_name().items():
                    self.held.setdefault(name, []).append(share)
                    share.adapters = self
                layer.adapters = self

    def forget(self, name: str, share: Share) -> None:
        """Drop one share of an adapter, and with the last one the adapter."""
        self.held[name].remove(share)
        if not self.held[name]:
            del self.held[name]
            self.weights.pop(name, None)


_NEW = vars(nn.Module())
HOOKS = frozenset(name for name, value in _NEW.items() if isinstance(value, OrderedDict))
_TABLES = {name: type(value) for name, value in _NEW.items() if isinstance(value, dict | set) and name not in HOOKS}
_PLAIN = {name: value for name, value in _NEW.items() if not isinstance(value, dict | set)}


class Share(nn.Module):
    """One adapter's part of one layer.

    Thousands of them lie in a model that serves many adapters, so the tables of hooks that every module has, most of its size and
    of the time to make it, are made when first asked for.

    Attributes:
        name: of its adapter.
        adapters: those of the model it lies in.
        origin: the configuration that it was made from, for whoever saves it.
    """

    name: str = ""
    adapters: Adapters
    origin: object = None

    def __init__(self) -> None:
        self.__dict__.update(_PLAIN, adapters=Adapters(), **{name: table() for name, table in _TABLES.items()})

    def __getattr__(self, name: str) -> Any:
        if name in HOOKS:
            object.__setattr__(self, name, OrderedDict())
            return self.__dict__[name]
        return super().__getattr__(name)

    @property
    def weight_when_active(self) -> float:
        """The factor its contribution is multiplied by, as that of its adapter's other shares; 0.0 while it is not active."""
        return self.adapters.weights.get(self.name, 0.0)

    @weight_when_active.setter
    def weight_when_active(self, weight: float) -> None:
        self.adapters.weights[self.name] = weight

    def requires_grad_(self, requires_grad: bool = True) -> Share:
        """As of any module, but at the cost of its few parameters alone."""
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.requires_grad = requires_grad
        for inner in self._modules.values() if self._modules else ():
            cast(nn.Module, inner).requires_grad_(requires_grad)
        return self

    def saved(self, base: nn.Module) -> dict[str, Tensor]:
        """The tensors of its file, by PEFT's suffix after the module's path."""
        raise NotImplementedError

    def plain(self, base: nn.Module) -> dict[str, Tensor]:
        """The tensors of a file that says the same as a plain update of the base, whatever this share was made from."""
        return self.saved(base)

    def load(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of `saved` back, whose names and shapes were checked before; uncopied, where their type fits."""
        raise NotImplementedError


def adopt(parameter: Tensor, values: Tensor) -> None:
    """Let a parameter hold `values`, which may lie in a mapped file, in its own type and on its own device."""
    parameter.data = values.to(parameter.device, parameter.dtype)


class AdapterLayer(nn.Module):
    """A frozen `base` module and its `shares`, by adapter name.

    Attributes:
        adapters: which adapters count now, the same object in every layer of a model.
        routed: whether it sees the rows that a router picks, in the router's order.
    """

    base: nn.Module
    shares: nn.ModuleDict
    adapters: Adapters
    routed: bool = False

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._modules.update(base=base, shares=nn.ModuleDict())  # as assigning them does, at a tenth of the time
        self.__dict__.update(adapters=Adapters(), training=base.training)

    def add(self, name: str, share: Share) -> None:
        """Hold one more adapter's share, active only if it was active by itself."""
        shares = self.by_name()
        if name in shares:
            raise ConfigError(f"an adapter named '{name}' is attached already; detach it or choose another name")
        if share.training != self.training:
            share.train(self.training)
        shares[checked_name(name)] = share
        if share.weight_when_active:
            self.adapters.weights[name] = share.weight_when_active
        share.__dict__.update(name=name, adapters=self.adapters)
        self.adapters.held.setdefault(name, []).append(share)

    def remove(self, name: str) -> None:
        """Let go of an adapter's share, if there is one."""
        if name in self.shares:
            self.adapters.forget(name, self.by_name()[name])
            del self.shares[name]

    def by_name(self) -> dict[str, Share]:
        """The shares by adapter name, as a plain table."""
        return cast(dict[str, Share], self.shares._modules)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """As of any module; in a mixed batch, each row with its own adapters.

        Raises:
            ConfigError: in a mixed batch, the rows come in the order of a router.
        """
        if self.adapters.rows is None or not self.adapters.enabled:
            return super().__call__(*args, **named)
        if self.routed and not self.by_name().keys().isdisjoint(self.adapters.rows.names):
            raise ConfigError(in_other_order(self.base))
        return self.by_rows(self.adapters.rows, *args, **named)

    def bare(self, *args: Any, **named: Any) -> Any:
        """The output of the base alone."""
        return self.base(*args, **named)

    def by_rows(self, rows: Rows, *args: Any, **named: Any) -> Tensor:
        """The output for rows with adapters of their own: the base's, and over it that of each combination of adapters.

        Raises:
            ConfigError: some row's adapter changes this layer, and an argument's first dimension is not the batch, so that no row
                can be told from another.
        """
        y: Tensor = self.bare(*args, **named)
        groups = [(weights, at) for weights, at in rows.groups() if not weights.keys().isdisjoint(self.by_name())]
        if not groups:
            return y
        inputs = [v for v in (*args, *named.values(), y) if v is not None]
        if any(not isinstance(v, Tensor) or v.dim() == 0 or len(v) != len(rows.weights) for v in inputs):
            raise ConfigError(not_rows(self.base, rows))
        before = self.adapters.weights
        try:
            self.adapters.rows = None
            for weights, chosen in groups:
                self.adapters.weights = weights
                at = chosen.to(y.device)
                some = [None if a is None else a.index_select(0, at) for a in args]
                part = self(*some, **{n: None if a is None else a.index_select(0, at) for n, a in named.items()})
                y = y.index_copy(0, at, part)
        finally:
            self.adapters.weights, self.adapters.rows = before, rows
        return y

    def active(self) -> list[Share]:
        """The shares that contribute now, in the order the adapters came."""
        if not self.adapters.enabled:
            return []
        shares = self.by_name()
        return [shares[n] for n, weight in self.adapters.weights.items() if weight and n in shares]

    @property
    def folding(self) -> bool:
        """Whether it runs on a merged weight that is formed for each pass and not kept."""
        return self.adapters.folding

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

    def is_merged(self) -> bool:
        """Whether it runs on merged weights that are kept."""
        return False

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


def parameters_below(module: nn.Module) -> list[nn.Parameter]:
    """Its parameters, as `parameters` has them (one that is shared comes as often as it is), at a tenth of the time."""
    found = [p for p in module._parameters.values() if p is not None]
    for child in module._modules.values():
        if child is not None:
            found += parameters_below(child)
    return found


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its name in the bare model, as `named_modules` does, but for what lies inside of adapted layers."""
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if not isinstance(module, AdapterLayer):
            prefix = f"{name}." if name else ""
            waiting += [(prefix + n, child) for n, child in reversed(module._modules.items()) if child is not None]


def adapted_layers(model: nn.Module) -> list[AdapterLayer]:
    """The adapted layers among `bare_modules`, without their names and at a third of the time."""
    seen: set[nn.Module] = set()
    found, waiting = [], [model]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            if isinstance(module, AdapterLayer):
                found.append(module)
            elif module._modules:
                waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return found


_CONTAINER = nn.ModuleDict()


@cache
def checked_name(name: str) -> str:
    """`name` if an adapter may bear it.

    Raises:
        ConfigError: it holds characters that files and requests cannot carry, or is a word of the container itself.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_@-]*", name) or hasattr(_CONTAINER, name):
        raise ConfigError(f"'{name}' cannot name an adapter: use letters, digits, '_', '-' and '@', as in 'my-adapter'")
    return name


def bias_of(module: nn.Module) -> Tensor:
    """The bias of a module that has one."""
    bias: Tensor = module.bias  # type: ignore[assignment]
    return bias
