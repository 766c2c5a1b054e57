"""Safetensors files: headers, lazy reads, and writes that are whole or absent."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from twofold import atomic
from twofold.errors import AdapterFileError
from twofold.events import Pieces, finished

SUMMED_BYTES = 1 << 20
"""Of a file, in one piece."""
TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    },
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file, mapped into memory once. Its tensors are views of that map: no byte is read before it is used, none is
    copied, and a tensor that is written to becomes private, page by page, while the file stays as it is.

    Attributes:
        shapes: of the tensors, by key.
        metadata: what else the header says, as texts.

    Raises:
        AdapterFileError: missing, cut short or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise AdapterFileError(f"{path} does not exist")
        try:
            self._entries, self._start, self.metadata = _header(path)
            self._bytes = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError) as error:
            raise AdapterFileError(
                f"{path} is damaged or not a safetensors file ({error}); copy or train it again"
            ) from error
        self.shapes = {key: entry.shape for key, entry in self._entries.items()}

    @property
    def header(self) -> bytes:
        """All that stands before the first tensor, as it stands there: the same for a file of other values."""
        with self.path.open("rb") as file:
            return file.read(self._start)

    def dtype(self, key: str) -> torch.dtype:
        """The stored type of one tensor."""
        return self._entries[key].dtype

    def in_order(self) -> list[str]:
        """Keys as their tensors lie in the file, one behind the other."""
        return sorted(self._entries, key=lambda key: (self._entries[key].begin, self._entries[key].end))

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, in its stored type: a view of the file."""
        entry = self._entries[key]
        raw = self._bytes[self._start + entry.begin : self._start + entry.end]
        if (self._start + entry.begin) % entry.dtype.itemsize:  # old writers did not align
            raw = raw.clone()
        return raw.view(entry.dtype).view(entry.shape)

    def expect(self, key: str) -> None:
        """Let the system read one tensor ahead, while something else is computed; where it cannot, nothing happens."""
        if hasattr(os, "posix_fadvise"):
            entry = self._entries[key]
            with self.path.open("rb") as file:
                os.posix_fadvise(
                    file.fileno(), self._start + entry.begin, entry.end - entry.begin, os.POSIX_FADV_WILLNEED
                )

    def checking_finite(self) -> Pieces[bool]:
        """Whether it certainly holds no NaN and no infinity, from one pass over the file in pieces.

        A sum over values is finite only if each of them is; one that overflows says nothing, nor does a file of several types.
        """
        types = {entry.dtype for entry in self._entries.values()}
        (dtype, *others) = types or {torch.float32}
        whole = self._bytes[self._start :]
        if others or not dtype.is_floating_point or self._start % dtype.itemsize or len(whole) % dtype.itemsize:
            return False
        for part in whole.view(dtype).split(SUMMED_BYTES // dtype.itemsize):
            yield
            if not bool(torch.isfinite(part.sum())):
                return False
        return True

    def nonfinite(self) -> list[str]:
        """Keys of the tensors that hold a NaN or an infinity."""
        if finished(self.checking_finite()):
            return []
        return [key for key in self.shapes if nonfinite({key: self.read(key)})]


def _header(path: Path) -> tuple[dict[str, _Entry], int, dict[str, str]]:
    """The entries by key, where their bytes start, and the metadata.

    The tensors must fill the file without gaps, as safetensors prescribes.

    Raises:
        ValueError, TypeError, KeyError: the file is not so.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size - 8 - length
        if size < 0 or not length:
            raise ValueError("its header reaches beyond its end")
        raw = json.loads(file.read(length))
    metadata = dict(raw.pop("__metadata__", {}))
    entries = {
        key: _Entry(TYPES[e["dtype"]], tuple(e["shape"]), *map(int, e["data_offsets"])) for key, e in raw.items()
    }
    at = 0
    for key, entry in sorted(entries.items(), key=lambda e: (e[1].begin, e[1].end)):
        if entry.begin != at or entry.end - at != math.prod(entry.shape) * entry.dtype.itemsize:
            raise ValueError(f"'{key}' does not lie where its shape and its neighbours say")
        at = entry.end
    if at != size:
        raise ValueError(f"its tensors take {at} bytes of {size}")
    return entries, length + 8, metadata


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; equal tensors give equal bytes, whatever order they come in."""
    whole = {key: tensors[key].detach().to("cpu", copy=False).contiguous() for key in sorted(tensors)}
    storages = [t.untyped_storage().data_ptr() for t in whole.values()]
    if len(set(storages)) < len(storages):
        whole = {key: tensor.clone() for key, tensor in whole.items()}
    with atomic.new_file(path) as temporary:
        temporary.touch()
        usual = temporary.stat().st_mode
        try:
            save_file(whole, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        temporary.chmod(usual)  # safetensors makes files that nobody but their owner may read


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
