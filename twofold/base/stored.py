"""A base as it lies on disk: its safetensors shards, and which tensor of them each parameter of the live model came from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twofold.base.fingerprint import Sampled, sampled_at
from twofold.base.load import ORIGIN, first_line, locate
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

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all of its tensors."""
        return {key: shape for file in self.shards.values() for key, shape in file.shapes.items()}

    def read(self, key: str) -> Tensor:
        """One tensor, as a view of its file."""
        return self.shards[self.where[key]].read(key)

    def expect(self, key: str) -> None:
        """Let the system read one tensor ahead."""
        self.shards[self.where[key]].expect(key)

    def sampled(self, pieces: list[Piece], parameter: Tensor) -> Sampled:
        """What a fingerprint needs of a parameter whose values lie apart."""
        _, rows, columns = parameter.shape
        values = []
        for at in sampled_at(parameter.numel()).tolist():
            expert, row, column = at // (rows * columns), at // columns % rows, at % columns
            piece = next(p for p in pieces if p.expert == expert and p.rows.start <= row < p.rows.stop)
            values.append(float(self.read(piece.key)[row - piece.rows.start, column].to(torch.bfloat16)))
        return Sampled(tuple(parameter.shape), values)

    def dtype(self) -> torch.dtype | None:
        """The type of most of its values; None if none are floating."""
        counts: dict[torch.dtype, int] = {}
        for file in self.shards.values():
            for key, shape in file.shapes.items():
                if (dtype := file.dtype(key)).is_floating_point:
                    counts[dtype] = counts.get(dtype, 0) + torch.Size(shape).numel()
        return max(counts, key=lambda d: counts[d], default=None)


def copy_others(source: Path, folder: Path) -> None:
    """Copy every file of a model's folder that holds no weights."""
    for inner in _inside(source):
        if (source / inner).is_file() and not _is_weights(inner):
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / inner, folder / inner)


def left_behind(source: Path) -> list[str]:
    """What of a model's folder `copy_others` leaves out, the model itself aside: other weights, links to folders or to nothing."""
    found = [inner for inner in _inside(source) if _is_weights(inner) or not (source / inner).exists()]
    links = [inner for inner in _inside(source) if (source / inner).is_symlink() and (source / inner).is_dir()]
    own = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
    return sorted(str(inner) for inner in {*found, *links} if not own.fullmatch(str(inner)))


def _inside(folder: Path) -> list[Path]:
    """All that is in a folder and not hidden, relative to it."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")))
    return [inner for inner in found if inner.name != ORIGIN and not any(part.startswith(".") for part in inner.parts)]


def _is_weights(inner: Path) -> bool:
    return inner.suffix in WEIGHTS or inner.name.endswith(".index.json")


def open_stored(reference: str) -> StoredBase:
    """The files behind a reference.

    Raises:
        BaseError: no such base, or it is not stored as safetensors.
    """
    folder = folder_of(reference)
    try:
        if (folder / SINGLE).is_file():
            return StoredBase(folder, {SINGLE: TensorFile(folder / SINGLE)}, None)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        return StoredBase(folder, {name: TensorFile(folder / name) for name in names}, index)
    except (OSError, ValueError, KeyError, UserError) as error:
        raise BaseError(f"{reference} does not lie on disk as whole safetensors files ({error})") from error


def folder_of(reference: str) -> Path:
    """Where a base's files lie.

    Raises:
        BaseError: no such base, or the hub does not give it.
    """
    source = locate(reference)
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils import cached_file

    try:
        return Path(cached_file(source, "config.json")).parent
    except OSError as error:
        raise BaseError(f"cannot find the files of {reference}: {first_line(error)}") from error


class Piece(NamedTuple):
    """A tensor of the files that is fused with others on loading: some rows of one expert's matrix in a parameter of three
    dimensions."""

    key: str
    expert: int
    rows: slice


@dataclass(frozen=True)
class Places:
    """Where the parameters of a live model lie in its files, by the names that they have without adapters.

    Attributes:
        alone: the key of the tensor with the same values.
        fused: the pieces that it is made of on loading, all of it.
    """

    alone: dict[str, str]
    fused: dict[str, list[Piece]]


def places_in_model(model: Any, shapes: Mapping[str, tuple[int, ...]], parameters: Mapping[str, Any]) -> Places:
    """By transformers' own conversion mapping, what became of the tensors of a checkpoint; those that were joined or split in
    other ways than experts are belong to no place.

    Args:
        model: the live model, with or without adapters.
        shapes: of the checkpoint's tensors, by key.
        parameters: the model's own, by the names it has without adapters.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, alone = dict(parameters), {}
    joined: dict[str, dict[str, list[str]]] = {}
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = key, None
        if pattern is None and name in known:
            alone[name] = key
        elif pattern is not None:
            joined.setdefault(name, {}).setdefault(pattern, []).append(key)
    found = {n: _pieces(by_pattern[next(iter(keys))], keys, shapes) for n, keys in joined.items() if n in known}
    return Places(alone, {n: p for n, p in found.items() if p and _fills(p, shapes, tuple(known[n].shape))})


def _pieces(converter: Any, keys: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]) -> list[Piece] | None:
    """Of experts stacked, and their matrices laid one under the other; None of whatever else a converter does."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(step), step.dim) for step in converter.operations if hasattr(step, "dim")]
    stacked = [(MergeModulelist, 0), (Concatenate, 1)][: len(converter.operations)]
    if steps != stacked or len(keys) != len(converter.source_patterns) or len(keys) > len(steps):
        return None
    pieces, start = [], 0
    for pattern in converter.source_patterns:
        end = start + shapes[keys[pattern][0]][0]
        pieces += [Piece(key, expert, slice(start, end)) for expert, key in enumerate(keys[pattern])]
        start = end
    return pieces


def _fills(pieces: list[Piece], shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    """Whether pieces are all of a parameter of this shape."""
    fit = all(shapes[p.key] == (p.rows.stop - p.rows.start, shape[-1]) and p.expert < shape[0] for p in pieces)
    return len(shape) == 3 and fit and sum(p.rows.stop - p.rows.start for p in pieces) == shape[0] * shape[1]
