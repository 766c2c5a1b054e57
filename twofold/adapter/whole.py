"""What an adapter's file holds besides factors: values held whole, copies of the base's own weights, and what nothing reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from twofold.adapter.files import AdapterFiles
from twofold.adapter.names import matcher, parents, tails
from twofold.adapter.peft_config import PAST_TENSORS
from twofold.adapter.updates import PARTNERS
from twofold.errors import AdapterFileError

Name: TypeAlias = tuple[str, str]
"""A module's path, and what follows it in a tensor's key."""
ReadBase: TypeAlias = Callable[[str], Tensor]
"""From a parameter's name in the model to its values."""
TOKENS = "token_adapter.trainable_tokens_delta"
MAGNITUDES = "lora_magnitude_vector"
COPY = "base_layer.weight"
"""How the key ends of the base's own embedding or head, which PEFT writes beside an adapter of it."""


def whole_names(files: AdapterFiles) -> frozenset[Name]:
    """Biases, modules trained whole, rows of tokens, lengths of rows."""
    return frozenset((module, suffix) for module, suffix in _beside_factors(files) if not suffix.endswith(COPY))


def copied_modules(files: AdapterFiles) -> list[str]:
    """The modules whose base weight lies beside their factors."""
    return [module for module, suffix in _beside_factors(files) if suffix.endswith(COPY)]


def unknown_said(files: AdapterFiles) -> str | None:
    """One sentence of the tensors that the config has no word for; None if there are none."""
    found = [f"{module}.{suffix}" for module, suffix in sorted(whole_names(files)) if not _known(files, module, suffix)]
    if not found:
        return None
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{files.path} holds '{found[0]}'{more}, which is no part of the adapter that its config describes"


def check_copies(files: AdapterFiles, base: ReadBase) -> None:
    """Refuse an adapter of a base whose embedding was another.

    Raises:
        AdapterFileError: a copy of a weight of the base is not the base's.
    """
    for module in copied_modules(files):
        ours = base(f"{module}.weight")
        keys = files.modules()[module]
        found = files.tensors.read(next(key for suffix, key in keys.items() if suffix.endswith(COPY)))
        if ours.shape != found.shape or not torch.equal(found.to(ours), ours):
            raise AdapterFileError(
                f"{files.path} holds a weight of '{module}' ({COPY}) that is not the base's, so it was trained over another one; "
                "merge it into that base instead"
            )


def _beside_factors(files: AdapterFiles) -> Iterator[Name]:
    factors = {*PARTNERS, *(["lora_B.bias"] if files.config.lora_bias else [])}
    for module, keys in files.modules().items():
        for suffix in keys:
            if not (factors.intersection(tails(suffix)) or suffix.endswith(PAST_TENSORS)):
                yield module, suffix


def _known(files: AdapterFiles, module: str, suffix: str) -> bool:
    config = files.config
    if suffix == TOKENS:
        return bool(config.trainable_token_indices)
    if suffix == MAGNITUDES:
        return config.use_dora
    trained_whole = matcher(config.modules_to_save or ())
    return (config.bias != "none" and suffix.endswith("bias")) or any(map(trained_whole, parents(module)))
