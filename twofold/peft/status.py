"""What adapters there are and what state they are in, layer by layer and for a whole model, in PEFT's shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from twofold.adapter.attach import adapter_layers, adapters_of, trainable_summary
from twofold.errors import ConfigError
from twofold.layers.protocol import AdapterLayer
from twofold.layers.quantised import frozen_of
from twofold.quant import NF4Weight

Irregular = Literal["irregular"]
V = TypeVar("V")


@dataclass(frozen=True)
class TunerLayerStatus:
    """One adapted module. Its name is that in the bare model, its type the name of the class around it."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass(frozen=True)
class TunerModelStatus:
    """A whole model; "irregular" is what layers disagree on."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each adapted module.

    Raises:
        ConfigError: no adapter is attached.
    """
    found = [_of_layer(name, layer) for name, layer in adapter_layers(model)]
    if not found:
        raise ConfigError(
            "no adapter is attached to this model; call get_peft_model or PeftModel.from_pretrained first"
        )
    return found


def _of_layer(name: str, layer: AdapterLayer) -> TunerLayerStatus:
    active = [n for n, weight in layer.adapters.weights.items() if weight]
    shares, packed = layer.by_name(), frozen_of(layer.base)
    return TunerLayerStatus(
        name=name,
        module_type=type(layer).__name__,
        enabled=layer.adapters.enabled,
        active_adapters=active,
        merged_adapters=[n for n in active if n in shares] if layer.is_merged() else [],
        requires_grad={n: _one(p.requires_grad for p in share.parameters()) for n, share in shares.items()},
        available_adapters=sorted(shares),
        devices={n: sorted({p.device.type for p in share.parameters()}) for n, share in shares.items()},
        quantization_backend=None if packed is None else "nf4" if isinstance(packed, NF4Weight) else "int8",
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of a model's adapters as a whole.

    Raises:
        ConfigError: no adapter is attached.
    """
    layers = get_layer_status(model)
    names = sorted({n for layer in layers for n in layer.available_adapters})
    counts = trainable_summary(model)
    merged = {n for layer in layers for n in layer.merged_adapters}
    partly = any(merged & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers)
    plain: Any = next(c for c in type(model).__mro__ if c.__module__ != "twofold.peft.model")
    return TunerModelStatus(
        base_model_type=plain.__name__,
        adapter_model_type="LoraModel",
        peft_types=dict.fromkeys(names, "LORA"),
        trainable_params=counts.trainable,
        total_params=sum(p.numel() for p in model.parameters()),
        num_adapter_layers=len(layers),
        enabled=_one(adapters.enabled for adapters in adapters_of(model)),
        active_adapters=_one(layer.active_adapters for layer in layers),
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={n: _one(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names},
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, ())}) for n in names},
        quantization_backend=_one(layer.quantization_backend for layer in layers),
    )


def _one(values: Iterable[V]) -> V | Irregular:
    """The value that all have."""
    first, *others = list(values)
    return first if all(other == first for other in others) else "irregular"
