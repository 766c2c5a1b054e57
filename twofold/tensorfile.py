"""Safetensors files: headers, lazy reads, and writes that are whole or absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twofold import atomic
from twofold.errors import AdapterFileError


class TensorFile:
    """A safetensors file, opened by its header; tensors are read one at a time when asked for.

    Raises:
        AdapterFileError: missing, cut short or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise AdapterFileError(f"{path} does not exist")
        try:
            self._file: Any = safe_open(path, framework="pt")
            self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(
                f"{path} is damaged or not a safetensors file ({error}); copy or train it again"
            ) from error

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, in its stored type."""
        tensor: Tensor = self._file.get_tensor(key)
        return tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; equal tensors give equal bytes, whatever order they come in."""
    whole = {key: tensors[key].detach().to("cpu", copy=False).contiguous() for key in sorted(tensors)}
    storages = [t.untyped_storage().data_ptr() for t in whole.values()]
    if len(set(storages)) < len(storages):
        whole = {key: tensor.clone() for key, tensor in whole.items()}
    with atomic.new_file(path) as temporary:
        try:
            save_file(whole, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
