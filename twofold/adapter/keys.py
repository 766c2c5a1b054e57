"""The keys of PEFT's files, and which of the tensors that nothing reads may stay in them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import cast

import torch
from torch import Tensor, nn

from twofold.tensorfile import TensorFile

PREFIX = "base_model.model."


def split_key(key: str) -> tuple[str, str]:
    """Module path and suffix of a tensor's key in the file."""
    bare = key.removeprefix(PREFIX)
    found = [at for at in map(bare.find, (".lora_", ".base_layer.", ".token_adapter.")) if at >= 0]
    if found:
        return bare[: min(found)], bare[min(found) + 1 :]
    module, _, suffix = bare.rpartition(".")
    return module, suffix


def says_nothing_new(
    model: nn.Module, bases: Mapping[str, nn.Module], tensors: TensorFile, key: str, read: Set[str]
) -> bool:
    """Whether a tensor that nothing reads may stay.

    PEFT saves the whole base embedding or head beside its adapter, and with `bias: all` some biases under several names: that of
    a module trained whole, its original's, and each name of a tied one. They may stay if they say what is known anyway.
    """
    found = tensors.read(key)
    twin = key.replace(".modules_to_save.", ".")
    if twin == key:
        ours = _base_tensor(bases, key.replace(".original_module.", "."))
        if ours is not None:
            return ours.shape == found.shape and torch.equal(found.to(ours), ours)
        tied = _plain_tensor(model, key) if key.endswith(".bias") else None
        twin = next((k for k in read if tied is not None and _base_tensor(bases, k) is tied), key)
    return twin in read and torch.equal(tensors.read(twin), found)


def _base_tensor(bases: Mapping[str, nn.Module], key: str) -> Tensor | None:
    """The base's own tensor that a key of the file stands for, if it is one of an adapted module."""
    module, suffix = split_key(key)
    own = ("base_layer.weight", "base_layer.bias", "weight", "bias")
    if module not in bases or suffix.removeprefix("token_adapter.") not in own:
        return None
    return cast(Tensor | None, getattr(bases[module], suffix.rpartition(".")[2], None))


def _plain_tensor(model: nn.Module, key: str) -> Tensor | None:
    """The tensor of that name in a module without adapters."""
    module, suffix = split_key(key)
    try:
        return cast(Tensor | None, getattr(model.get_submodule(module), suffix, None))
    except AttributeError:
        return None
