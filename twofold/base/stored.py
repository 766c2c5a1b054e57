"""A base as it lies on disk: its safetensors shards, and which tensor of them each parameter of the live model came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.base.load import ORIGIN, locate
from twofold.errors import BaseError, UserError
from twofold.tensorfile import TensorFile

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}
"""Ends of files that hold weights of their own: they would say something else than merged ones."""


@dataclass(frozen=True)
class StoredBase:
    """A folder of safetensors files.

    Attributes:
        folder: where it lies.
        shards: the files with tensors, by name.
        index: the content of its index, if it has one.
    """

    folder: Path
    shards: dict[str, TensorFile]
    index: dict[str, Any] | None

    @cached_property
    def where(self) -> dict[str, str]:
        """The shard of each tensor."""
        return {key: name for name, file in self.shards.items() for key in file.shapes}

    def read(self, key: str) -> Tensor:
        """One tensor, as a view of its file."""
        return self.shards[self.where[key]].read(key)

    def dtype(self) -> torch.dtype | None:
        """The type of most of its values; None if none are floating."""
        counts: dict[torch.dtype, int] = {}
        for file in self.shards.values():
            for key, shape in file.shapes.items():
                if (dtype := file.dtype(key)).is_floating_point:
                    counts[dtype] = counts.get(dtype, 0) + torch.Size(shape).numel()
        return max(counts, key=lambda d: counts[d], default=None)

    def others(self) -> Iterator[Path]:
        """Every other file that belongs to the model, relative to the folder; weights in other formats do not."""
        for path in sorted(self.folder.rglob("*")):
            inner = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in inner.parts)
            weights = path.suffix in WEIGHTS or inner.name.endswith(".index.json")
            if path.is_file() and not (hidden or weights or inner.name == ORIGIN):
                yield inner


def open_stored(reference: str) -> StoredBase:
    """The files behind a reference.

    Raises:
        BaseError: no such base, or it is not stored as safetensors.
    """
    folder = _folder(locate(reference))
    try:
        if (folder / SINGLE).is_file():
            return StoredBase(folder, {SINGLE: TensorFile(folder / SINGLE)}, None)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        return StoredBase(folder, {name: TensorFile(folder / name) for name in names}, index)
    except (OSError, ValueError, KeyError, UserError) as error:
        raise BaseError(f"{reference} does not lie on disk as whole safetensors files ({error})") from error


def _folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils import cached_file

    return Path(cached_file(source, "config.json")).parent


def names_in_model(model: Any, keys: Mapping[str, str], parameters: Mapping[str, Any]) -> dict[str, str]:
    """Checkpoint keys by the name of the parameter that holds the same values, without those fused or split on loading.

    Args:
        model: the live model, with or without adapters.
        keys: of the checkpoint.
        parameters: the model's own, by the names it has without adapters.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    found, known = {}, dict(parameters)
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if converted is None and name in parameters:
            found[name] = key
    return found
