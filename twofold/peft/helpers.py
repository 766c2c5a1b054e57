"""PEFT's functions beside the model's methods: an adapter's tensors as a table, one put into a model or in another's place, and
a base made ready.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor, nn

from twofold.adapter import attach as live
from twofold.adapter.files import TENSORS, adapter_tensors, load_adapter, read_adapter, set_tensors
from twofold.adapter.keys import PREFIX
from twofold.errors import ConfigError, UserError
from twofold.peft.arguments import check_inert
from twofold.peft.config import Hub, LoraConfig, PeftConfig, folder_of
from twofold.peft.model import PeftModel
from twofold.tensorfile import TensorFile

Model = TypeVar("Model", bound=nn.Module)


class Incompatible(NamedTuple):
    """What `set_peft_model_state_dict` returns: both empty, or it would have raised."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: object = None,
    adapter_name: str = "default",
    *,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors by the keys of its file, or by their bare names where it was injected without PEFT's methods.

    `state_dict` is not needed: the layers are asked.
    """
    check_inert(save_embedding_layers=save_embedding_layers)
    prefix = _prefix(model)
    return {f"{prefix}{key.removeprefix(PREFIX)}": t for key, t in adapter_tensors(model, adapter_name).items()}


def _prefix(model: nn.Module) -> str:
    """What PEFT's keys of this model's tensors begin with."""
    return PREFIX if isinstance(model, PeftModel) else ""


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Incompatible:
    """Give an attached adapter other values. A key too many, too few or of another shape is an error."""
    check_inert(ignore_mismatched_sizes=ignore_mismatched_sizes)
    missing = PREFIX.removeprefix(_prefix(model))
    set_tensors(model, {f"{missing}{key}": tensor for key, tensor in peft_model_state_dict.items()}, adapter_name)
    return Incompatible([], [])


def prepare_model_for_kbit_training(
    model: Model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> Model:
    """Freeze the base and turn checkpointing on. No tensor of the base changes its type, as they would in PEFT."""
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        able = cast(Any, model)
        able.enable_input_require_grads()
        able.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(gradient_checkpointing_kwargs or {}))
    return model


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: Model,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: object = None,
) -> Model:
    """Attach a new adapter to any module, without PEFT's methods; the same object comes back."""
    check_inert(state_dict=state_dict)
    live.attach(model, peft_config.for_model(model), adapter_name)
    return model


def get_peft_config(config_dict: Mapping[str, Any]) -> LoraConfig:
    """A config from a table of settings.

    Raises:
        ConfigError: it is of another kind than LORA.
    """
    kind = str(config_dict.get("peft_type", "LORA"))
    if kind != "LORA":
        raise ConfigError(f"peft_type is {kind!r}, but adapters other than LoRA are not done here")
    return LoraConfig(**config_dict)


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Whether a folder or hub id holds an adapter that is understood here."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except UserError:
        return False
    return True


def load_peft_weights(
    model_id: str | Path,
    device: object = None,
    key_mapping: object = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Tensor]:
    """The tensors of an adapter's folder or hub id, by their keys in the file; on the CPU where no `device` is given."""
    check_inert(key_mapping=key_mapping)
    file = TensorFile(folder_of(model_id, Hub(subfolder, revision, token, cache_dir)) / TENSORS)
    return {key: file.read(key).to(cast(Any, device) or "cpu") for key in file.shapes}


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: object = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> None:
    """Put another adapter in the place of an attached one, under its name and with its weight; its ranks and modules may differ.

    A file that does not fit leaves the old one where it is.
    """
    folder = folder_of(model_name_or_path, Hub(subfolder, revision, token, cache_dir))
    learns = any(p.requires_grad for share in live.shares(model, adapter_name).values() for p in share.parameters())
    before = live.active(model)
    read_adapter(model, folder, f"{adapter_name}-swapped")
    live.detach(model, adapter_name)
    load_adapter(model, folder, adapter_name)
    live.activate(model, before)
    for share in live.shares(model, adapter_name).values():
        share.requires_grad_(learns)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float | int) -> Iterator[None]:
    """Every active adapter louder or quieter, for the length of a `with` block.

    Raises:
        ConfigError: none is active, or one cannot be scaled (DoRA, whole modules).
    """
    before = live.active(model)
    if not before:
        raise ConfigError("no adapter is active, so there is nothing to scale; call set_adapter")
    scaled = {name: weight * multiplier for name, weight in before.items()}
    live.check_weights(model, scaled)
    held = [(adapters, adapters.weights) for adapters in live.adapters_of(model)]
    try:
        for adapters, weights in held:
            adapters.weights = {name: scaled.get(name, weight) for name, weight in weights.items()}
        yield
    finally:
        for adapters, weights in held:
            adapters.weights = weights
