"""Put adapters on a live model, choose which of them count, and take them off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from torch import nn

from twofold.adapter.config import LoraConfig
from twofold.adapter.kinds import Part, parts_of
from twofold.adapter.target import find_targets, module_shapes
from twofold.adapter.variants import check_variants
from twofold.errors import ConfigError, did_you_mean
from twofold.layers.protocol import AdapterLayer, Share, checked_name
from twofold.layers.quantised import values_of
from twofold.layers.saved import CopyShare
from twofold.lowrank.init import Factors

DEFAULT_NAME = "default"


@dataclass(frozen=True)
class TrainableSummary:
    """How much of a model learns, in numbers of parameters."""

    trainable: int
    base: int
    modules: int

    @property
    def fraction(self) -> float:
        """Trainable over base parameters."""
        return self.trainable / self.base

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.base:,} parameters train ({self.fraction:.2%}), in {self.modules} modules"


def attach(
    model: nn.Module, config: LoraConfig, name: str = DEFAULT_NAME, *, factors: Mapping[str, Factors] | None = None
) -> TrainableSummary:
    """Freeze the model and give every targeted module a share of a new adapter, which becomes the active one.

    The base's tensors are never written, now or in training. Values of the start are drawn from torch's generator.

    Args:
        factors: A and B to start from, by module, for starts that are computed before (EVA, LoRA-GA, LoftQ).

    Raises:
        TargetError: an entry of the config matches nothing; all of them in one message.
        ConfigError: a variant is asked of a module that it is not defined for, the name is taken or cannot be one, adapters are
            merged, or one changes a module in another way; the model is as it was then.
    """
    if checked_name(name) in attached(model):
        raise ConfigError(f"an adapter named '{name}' is attached already; detach it or choose another name")
    _check_unmerged(model, "attaching another")
    targets = find_targets(config, module_shapes(model))
    check_variants(config, targets, factors)
    parts = parts_of(config, targets, factors)
    _check_kinds(model, parts)
    made = [part.make(_base_of(model, part.module)) for part in parts]
    if not attached(model):
        model.requires_grad_(False)
    _replace(model, {m: part.wrap(m) for part, m in _places(model, parts) if not isinstance(m, AdapterLayer)})
    for share, (_, layer) in zip(made, _places(model, parts), strict=True):
        share.origin = config
        cast(AdapterLayer, layer).add(name, share)
    activate(model, name)
    return trainable_summary(model)


def _check_kinds(model: nn.Module, parts: Sequence[Part]) -> None:
    """Adapters share a layer only if they change it in the same way: by factors, as a whole, or by its bias."""
    layers = dict(adapter_layers(model))
    clashes = [p.module for p in parts if p.module in layers and not _fits(layers[p.module], p)]
    if clashes:
        listed = ", ".join(f"'{m}'" for m in clashes[:8]) + (", ..." if len(clashes) > 8 else "")
        raise ConfigError(f"another adapter changes {listed} in another way (factors, whole, or bias alone); detach it")


def _fits(layer: AdapterLayer, part: Part) -> bool:
    return type(part.wrap(layer.base)) is type(layer)


def _check_unmerged(model: nn.Module, what: str) -> None:
    if is_merged(model):
        raise ConfigError(f"adapters are merged into this model; call unmerge before {what}")


def _base_of(model: nn.Module, module: str) -> nn.Module:
    found = model.get_submodule(module)
    return found.base if isinstance(found, AdapterLayer) else found


def _places(model: nn.Module, parts: Sequence[Part]) -> list[tuple[Part, nn.Module]]:
    return [(part, model.get_submodule(part.module)) for part in parts]


def _replace(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in place of some, wherever these stand: a T5's one embedding has three places."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in by:
                setattr(parent, name, by[child])


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every adapted layer with its module name in the bare model."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield name, module


def shares(model: nn.Module, name: str) -> dict[str, Share]:
    """The shares of one adapter, by module name.

    Raises:
        ConfigError: no adapter of that name is attached.
    """
    found = {n: cast(Share, layer.shares[name]) for n, layer in adapter_layers(model) if name in layer.shares}
    if not found:
        raise ConfigError(_unknown(name, attached(model)))
    return found


def attached(model: nn.Module) -> list[str]:
    """Names of the attached adapters, in the order they came."""
    return list(dict.fromkeys(name for _, layer in adapter_layers(model) for name in layer.shares))


def active(model: nn.Module) -> dict[str, float]:
    """The adapters that count now, with their weights."""
    found: dict[str, float] = {}
    for _, layer in adapter_layers(model):
        for name, share in layer.shares.items():
            if cast(Share, share).weight_when_active:
                found[name] = cast(Share, share).weight_when_active
    return found


def config_of(model: nn.Module, name: str = DEFAULT_NAME) -> LoraConfig:
    """The configuration that an attached adapter was made from."""
    return cast(LoraConfig, next(iter(shares(model, name).values())).origin)


def activate(model: nn.Module, names: str | Mapping[str, float] | None) -> None:
    """Choose the adapters that count: one name, several with a weight each, or None for the bare base.

    Only active adapters train.

    Raises:
        ConfigError: a name is not attached, or merged weights are in place.
    """
    weights = {} if names is None else {names: 1.0} if isinstance(names, str) else dict(names)
    known = attached(model)
    for name in weights:
        if name not in known:
            raise ConfigError(_unknown(name, known))
    _check_unmerged(model, "choosing others")
    _check_copies(model, weights)
    _check_magnitudes(model, weights)
    for _, layer in adapter_layers(model):
        for name, share in layer.shares.items():
            cast(Share, share).weight_when_active = weights.get(name, 0.0)
            share.requires_grad_(name in weights)


def _check_copies(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Whole modules do not add up: one adapter at a time may bring one, and only at its full weight."""
    for module, layer in adapter_layers(model):
        chosen = [n for n, s in layer.shares.items() if isinstance(s, CopyShare) and weights.get(n, 0.0)]
        if len(chosen) > 1 or any(weights[n] != 1 for n in chosen):
            names = " and ".join(f"'{n}'" for n in chosen)
            raise ConfigError(
                f"adapter {names} brings its own whole '{module}' (modules_to_save), which can be neither scaled nor summed; "
                "activate one such adapter alone, at weight 1"
            )


def _check_magnitudes(model: nn.Module, weights: Mapping[str, float]) -> None:
    """DoRA rescales the rows of base and update together, so it is neither a part of a sum nor scalable."""
    for module, layer in adapter_layers(model):
        chosen = [n for n in layer.shares if weights.get(n, 0.0)]
        lengths = [n for n in chosen if getattr(layer.shares[n], "magnitude", None) is not None]
        if lengths and (len(chosen) > 1 or weights[lengths[0]] != 1):
            raise ConfigError(
                f"adapter '{lengths[0]}' is DoRA, which sets the lengths of the rows of '{module}' itself, so it can be neither "
                "scaled nor summed with another; activate it alone, at weight 1"
            )


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The bare base, for the length of a `with` block."""
    layers = [layer for _, layer in adapter_layers(model)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off the model, or all; a layer without adapters gives way to its base, unchanged.

    Raises:
        ConfigError: no adapter of that name is attached, or it is merged with others that stay.
    """
    if name is not None:
        shares(model, name)
    if name is not None and attached(model) != [name]:
        _check_unmerged(model, "detaching one of them")
    layers = [layer for _, layer in adapter_layers(model)]
    for layer in layers:
        for held in [name] if name is not None else list(layer.shares):
            if held in layer.shares:
                del layer.shares[held]
    _replace(model, {layer: layer.base for layer in layers if not layer.shares})


def merge(model: nn.Module) -> None:
    """Fold the active adapters into weights of their own beside the base's: same outputs, no extra products.

    Lossless to undo: the base's tensors stay as they are and `unmerge` returns to them. Until then the adapted
    layers' weights are held twice.
    """
    for _, layer in adapter_layers(model):
        if layer.active():
            layer.merge()


def unmerge(model: nn.Module) -> None:
    """Go back from merged weights to the base and its adapters, bit for bit."""
    for _, layer in adapter_layers(model):
        layer.unmerge()


@contextmanager
def folding(model: nn.Module) -> Iterator[None]:
    """What `merge` makes, for the length of a `with` block, but each weight formed when its layer runs and dropped after."""
    layers = [layer for _, layer in adapter_layers(model)]
    try:
        for layer in layers:
            layer.folding = True
        yield
    finally:
        for layer in layers:
            layer.folding = False


def is_merged(model: nn.Module) -> bool:
    """Whether merged weights are in place."""
    return any(getattr(layer, "merged", None) is not None for _, layer in adapter_layers(model))


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Count the parameters that learn and those of the base."""
    layers = [layer for _, layer in adapter_layers(model)]
    shared = sum(p.numel() for layer in layers for p in layer.shares.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = values_of(model) - shared
    return TrainableSummary(trainable, base, sum(1 for layer in layers if layer.active()))


def _unknown(name: str, known: list[str]) -> str:
    there = f"attached are {', '.join(repr(k) for k in known)}" if known else "none is attached"
    return f"no adapter named '{name}'{did_you_mean(name, known)} ({there})"
