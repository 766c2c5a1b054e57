"""PEFT's functions beside the model's methods: an adapter's tensors as a table, and a base made ready."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor, nn

from twofold.adapter.files import adapter_tensors, set_tensors
from twofold.peft.arguments import check_inert

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
    """An adapter's tensors by the keys of its file. `state_dict` is not needed: the layers are asked."""
    check_inert(save_embedding_layers=save_embedding_layers)
    return adapter_tensors(model, adapter_name)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Incompatible:
    """Give an attached adapter other values. A key too many, too few or of another shape is an error."""
    check_inert(ignore_mismatched_sizes=ignore_mismatched_sizes)
    set_tensors(model, peft_model_state_dict, adapter_name)
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
