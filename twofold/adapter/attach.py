"""Put adapters on a live model, choose which of them count, and take them off again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

from torch import Tensor, nn

from twofold.adapter.config import LoraConfig
from twofold.adapter.kinds import Part, parts_of
from twofold.adapter.shapes import module_shapes
from twofold.adapter.target import Targets, find_targets
from twofold.adapter.variants import check_given, check_variants
from twofold.errors import ClashError, ConfigError, did_you_mean
from twofold.events import Pieces, finished
from twofold.layers.linear import LinearShare
from twofold.layers.protocol import (
    AdapterLayer,
    Adapters,
    Share,
    adapted_layers,
    bare_modules,
    checked_name,
    parameters_below,
)
from twofold.layers.quantised import unpacked
from twofold.layers.rows import is_routed
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
        ConfigError: a variant is asked of a module that it is not defined for, the name is taken or cannot be one, or adapters are
            merged; the model is as it was then.
        ClashError: another adapter changes a module in another way; the model is as it was then.
    """
    targets = find_targets(config, module_shapes(model))
    put_on(model, made_shares(model, targets, config, name, factors), config, name)
    return trainable_summary(model)


def freeze_a(model: nn.Module, name: str = DEFAULT_NAME) -> None:
    """Let only B of an attached adapter learn from now on, as `LoraConfig.freeze_a` does from its start (LoRA-FA).

    Raises:
        ConfigError: no such adapter is attached, or it adapts more than linear layers.
    """
    config = replace(config_of(model, name), freeze_a=True)
    plain = replace(config, init_lora_weights=True)  # whatever it started from, it has its factors
    check_variants(plain, find_targets(plain, module_shapes(model)))
    for share in shares(model, name).values():
        if isinstance(share, LinearShare):
            share.freeze_A()
        share.__dict__["origin"] = config


class Made(NamedTuple):
    """A share that is made but not on the model yet, and the layer that takes it."""

    layer: AdapterLayer
    share: Share

    @property
    def base(self) -> nn.Module:
        """The module that it changes."""
        return self.layer.base


def made_shares(
    model: nn.Module, targets: Targets, config: LoraConfig, name: str, factors: Mapping[str, Factors] | None = None
) -> dict[str, Made]:
    """A new adapter's shares by module, the model as it was.

    Raises:
        ConfigError: as `attach`.
    """
    return finished(making_shares(model, targets, config, name, factors))


def making_shares(
    model: nn.Module, targets: Targets, config: LoraConfig, name: str, factors: Mapping[str, Factors] | None = None
) -> Pieces[dict[str, Made]]:
    """`made_shares` in pieces."""
    check_variants(config, targets)
    check_given(config, targets, factors)
    modules, made, clashes = dict(bare_modules(model)), {}, []
    layers = [m for m in modules.values() if isinstance(m, AdapterLayer)]
    if any(checked_name(name) in layer.by_name() for layer in layers):
        raise ConfigError(f"an adapter named '{name}' is attached already; detach it or choose another name")
    _check_unmerged(layers, "attaching another")
    for part in parts_of(config, targets, factors):
        yield
        held = modules[part.module]
        layer = held if isinstance(held, AdapterLayer) else part.wrap(held)
        share = part.make(layer.base)
        clashes += [] if layer is not held or _fits(layer, share, part) else [part.module]
        made[part.module] = Made(layer, share)
    if clashes:
        listed = ", ".join(f"'{m}'" for m in clashes[:8]) + (", ..." if len(clashes) > 8 else "")
        raise ClashError(f"another adapter changes {listed} in another way (factors, whole, or bias alone); detach it")
    return made


def put_on(model: nn.Module, made: Mapping[str, Made], config: LoraConfig, name: str) -> None:
    """Give each layer its share of a new adapter, and make it the active one."""
    layers = adapted_layers(model)
    adapters = layers[0].adapters if layers else Adapters()
    if not layers:
        for parameter in parameters_below(model):
            parameter.requires_grad_(False)
    adapters.join([*layers, *(m.layer for m in made.values())])
    for module, (layer, share) in made.items():
        layer.routed = is_routed(module)
        share.__dict__["origin"] = config  # as assigning it does, but for a search among parameters
        layer.add(name, share)
    known = set(layers)
    _replace(model, {layer.base: layer for layer, _ in made.values() if layer not in known})
    adapters.activate({name: 1.0})


def _fits(layer: AdapterLayer, share: Share, part: Part) -> bool:
    """Adapters share a layer only if they change it in the same way: by factors, as a whole, or by its bias."""
    held = next(iter(layer.shares.values()))
    return type(held) is type(share) or type(part.wrap(layer.base)) is type(layer)


def _check_unmerged(layers: Iterable[AdapterLayer], what: str) -> None:
    if any(layer.is_merged() for layer in layers):
        raise ConfigError(f"adapters are merged into this model; call unmerge before {what}")


def _replace(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in place of some, wherever these stand: a T5's one embedding has three places."""
    seen: set[nn.Module] = set()
    waiting = [model] if by else []
    while waiting:
        parent = waiting.pop()
        seen.add(parent)
        for name, child in parent._modules.items():
            if child is not None and child in by:
                parent._modules[name] = by[child]
            elif child is not None and child not in seen:
                waiting.append(child)


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every adapted layer with its module name in the bare model."""
    for name, module in bare_modules(model):
        if isinstance(module, AdapterLayer):
            yield name, module


def adapters_of(model: nn.Module) -> list[Adapters]:
    """What the adapted layers refer to: one for a whole model, several where parts of it were adapted apart."""
    return list(dict.fromkeys(layer.adapters for layer in adapted_layers(model)))


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
    return list(dict.fromkeys(name for adapters in adapters_of(model) for name in adapters.held))


def active(model: nn.Module) -> dict[str, float]:
    """The adapters that count now, with their weights."""
    return {n: weight for adapters in adapters_of(model) for n, weight in adapters.weights.items() if weight}


def constants(model: nn.Module) -> dict[str, Tensor]:
    """What the active adapters hold and never learn, by its name in the model: a frozen A, the start an update is counted from."""
    return {
        f"{name}.{key}": tensor
        for name, share in model.named_modules()
        if isinstance(share, Share) and share.weight_when_active
        for key, tensor in share.state_dict(keep_vars=True).items()
        if not isinstance(tensor, nn.Parameter)
    }


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
    layers = adapted_layers(model)
    found = dict.fromkeys(layer.adapters for layer in layers)
    _check_known(found, weights)
    _check_unmerged(layers, "choosing others")
    check_weights(model, weights)
    for adapters in found:
        adapters.activate(weights)


def check_known(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse names that are not attached."""
    _check_known(adapters_of(model), names)


def _check_known(found: Iterable[Adapters], names: Iterable[str]) -> None:
    for name in names:
        if not any(name in adapters.held for adapters in found):
            raise ConfigError(_unknown(name, list(dict.fromkeys(n for adapters in found for n in adapters.held))))


def check_weights(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Refuse weights that an adapter cannot have: whole modules do not add up, and DoRA rescales base and update together."""
    if list(weights.values()) in ([], [1]):
        return
    _check_copies(model, weights)
    _check_magnitudes(model, weights)


def _check_copies(model: nn.Module, weights: Mapping[str, float]) -> None:
    """One adapter at a time may bring a whole module, and only at its full weight."""
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
    before = [(adapters, adapters.enabled) for adapters in adapters_of(model)]
    try:
        for adapters, _ in before:
            adapters.enabled = False
        yield
    finally:
        for adapters, enabled in before:
            adapters.enabled = enabled


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off the model, or all; a layer without adapters gives way to its base, unchanged.

    Raises:
        ConfigError: no adapter of that name is attached, or it is merged with others that stay.
    """
    if name is not None:
        shares(model, name)
    if name is not None and attached(model) != [name]:
        _check_unmerged(adapted_layers(model), "detaching one of them")
    layers = adapted_layers(model)
    for layer in layers:
        for held in [name] if name is not None else list(layer.shares):
            layer.remove(held)
    _replace(model, {layer: layer.base for layer in layers if not layer.shares})


def merge(model: nn.Module) -> None:
    """Fold the active adapters into weights of their own beside the base's: same outputs, no extra products.

    Lossless to undo: the base's tensors stay as they are and `unmerge` returns to them. Until then the adapted
    layers' weights are held twice.
    """
    for layer in adapted_layers(model):
        if layer.active():
            layer.merge()


def unmerge(model: nn.Module) -> None:
    """Go back from merged weights to the base and its adapters, bit for bit."""
    for layer in adapted_layers(model):
        layer.unmerge()


@contextmanager
def folding(model: nn.Module) -> Iterator[None]:
    """What `merge` makes, for the length of a `with` block, but each weight formed when its layer runs and dropped after."""
    found = adapters_of(model)
    try:
        for adapters in found:
            adapters.folding = True
        yield
    finally:
        for adapters in found:
            adapters.folding = False


def is_merged(model: nn.Module) -> bool:
    """Whether merged weights are in place."""
    return any(layer.is_merged() for layer in adapted_layers(model))


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Count the parameters that learn and those of the base."""
    base, learned, packed, modules = set[nn.Parameter](), set[nn.Parameter](), 0, 0
    for _, module in bare_modules(model):
        bare = module.base if isinstance(module, AdapterLayer) else module
        packed += unpacked(bare)
        base.update(
            parameters_below(bare) if bare is not module else (p for p in bare._parameters.values() if p is not None)
        )
        if isinstance(module, AdapterLayer):
            modules += bool(module.active())
            chosen = (module.shares[n] for n in module.adapters.weights if n in module.shares)
            learned.update(p for share in chosen for p in parameters_below(share))
    trainable = sum(p.numel() for p in base | learned if p.requires_grad)
    return TrainableSummary(trainable, sum(p.numel() for p in base) + packed, modules)


def _unknown(name: str, known: list[str]) -> str:
    there = f"attached are {', '.join(repr(k) for k in known)}" if known else "none is attached"
    return f"no adapter named '{name}'{did_you_mean(name, known)} ({there})"
