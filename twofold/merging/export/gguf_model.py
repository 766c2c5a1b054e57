"""A merged model as one GGUF file, streamed from the base's files: no more than the tensor at hand is held.

Matrices are written in the type that is asked for, all else in float32, as llama.cpp's convert_hf_to_gguf.py does. A sum is
rounded once, to the type of the file: of a base in float32 the tensors are those that the converter makes of the folder that
`twofold merge` writes, of one in bfloat16 they hold more of the adapter than that folder. What was written is read back, its values
are turned back into the model's, and compared with the merge formed once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from twofold import atomic
from twofold.errors import ConfigError, ProofError
from twofold.events import Emit, Progress, Warned, silent
from twofold.merging.disk import Replay
from twofold.merging.export.gguf_layout import Layout
from twofold.merging.export.gguf_settings import add_settings, further_tensors, ignored_window
from twofold.merging.export.gguf_tokens import add_habits, vocabulary

Values = Literal["f32", "f16", "bf16", "q8_0"]
TYPES: dict[Values, tuple[Type, gguf.LlamaFileType]] = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
ROUNDED = {Type.F32: 1e-7, Type.F16: 2.0**-11, Type.BF16: 2.0**-8, Type.Q8_0: 0.5 / 127 * 1.15}
"""The largest error of a value as a share of the tensor's largest: half a step; of q8_0 also that of its steps, kept in float16."""
AT_ONCE = 1 << 20
"""Values that are turned into another type at once."""
LEFT_OUT = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class Source:
    """A merge, and what its model is besides tensors.

    Attributes:
        replay: the base's files, and what changes them.
        layout: names and rows in llama.cpp.
        config: the model's.
        tokenizer: of the base.
        chat_template: in place of the base's.
    """

    replay: Replay
    layout: Layout
    config: Any
    tokenizer: Any
    chat_template: str | None = None

    @classmethod
    def of(cls, replay: Replay, config: Any, tokenizer: Any, chat_template: str | None = None) -> Source:
        """Raises ConfigError for a family whose layout is not known."""
        layout = Layout.of(config)
        if replay.untied:
            layout = replace(layout, tied=False)
        return cls(replay, layout, config, tokenizer, chat_template)

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config.to_dict()
        return found

    def keys(self, shard: str) -> list[str]:
        """Of the tensors that llama.cpp wants; a head that is the embedding it has already."""
        twice = {"lm_head.weight"} if self.layout.tied else set()
        return [k for k in self.replay.in_shard(shard) if k not in twice and not k.endswith(LEFT_OUT)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each by its key in the base's files, merged, and not yet rounded to their type; it is over with the next."""
        for shard in self.replay.base.shards:
            wanted = set(self.keys(shard))
            found = self.replay.tensors(shard, torch.float32)
            yield from ((key, tensor) for key, tensor in found if key in wanted)


def write_gguf_model(source: Source, path: Path, values: Values, name: str, emit: Emit = silent) -> float:
    """Write the file and read it back.

    Args:
        name: what the file calls the model.

    Returns:
        The largest error of a value, as a share of its tensor's largest: what the type rounds, 0 if nothing.

    Raises:
        ConfigError: llama.cpp has no such model, tensor or tokenizer, or values are beyond what the type holds.
        RunError: the file cannot be written.
        ProofError: what was read back is something else.
    """
    if path.suffix != ".gguf":
        raise ConfigError(f"{path} should be a file that ends in .gguf")
    architecture, settings = source.layout.family.architecture, source.settings
    if window := ignored_window(settings, architecture):
        said = (
            f"llama.cpp knows no window of attention for {architecture}: beyond {window} tokens its answers will differ"
        )
        emit(Warned(text=said))
    with atomic.new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        _declare(writer, source, TYPES[values][0])
        _describe(writer, source, TYPES[values][1], name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in dict(further_tensors(settings, architecture)).values():
            writer.write_tensor_data(tensor.numpy())
        _write(writer, source, TYPES[values][0], emit)
        writer.close()
        return _proved(temporary, source, path)


def _declare(writer: gguf.GGUFWriter, source: Source, wanted: Type) -> None:
    """Names, shapes and types of all tensors, which stand before the first of them."""
    for name, tensor in further_tensors(source.settings, source.layout.family.architecture):
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes)
    shapes, added = source.replay.base.shapes, source.replay.added
    for shard in source.replay.base.shards:
        for key in source.keys(shard):
            shape, name = shapes[added.get(key, key)], source.layout.name(key)
            kind = _type(name, shape, wanted)
            held = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, held, np.dtype(np.uint8), int(np.prod(held)), raw_dtype=kind)


def _type(name: str, shape: tuple[int, ...], wanted: Type) -> Type:
    if len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight"):
        return Type.F32
    return Type.F16 if wanted is Type.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _describe(writer: gguf.GGUFWriter, source: Source, file_type: gguf.LlamaFileType, name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    folder = source.replay.base.folder
    counts = writer.get_total_parameter_count()
    described = gguf.Metadata.load(None, folder, name, counts[0])
    described.size_label = described.size_label or gguf.size_label(*counts)
    described.set_gguf_meta_model(writer)
    settings = source.settings
    add_settings(writer, settings, source.layout.family.architecture)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokens = vocabulary(folder, source.tokenizer, settings["vocab_size"])
    tokens.add_to(writer, folder, source.chat_template)
    add_habits(writer, folder, settings, source.layout.family.architecture, tokens.kind)


def _write(writer: gguf.GGUFWriter, source: Source, wanted: Type, emit: Emit) -> None:
    total = sum(len(source.keys(shard)) for shard in source.replay.base.shards)
    for done, (key, tensor) in enumerate(source.tensors(), 1):
        name = source.layout.name(key)
        kind = _type(name, tuple(tensor.shape), wanted)
        writer.write_tensor_data(_encoded(source.layout.stored(key, tensor), kind, name))
        emit(Progress(task="writing tensors", done=done, total=total))


def _encoded(tensor: Tensor, kind: Type, name: str) -> NDArray[np.uint8]:
    """The bytes of a tensor, some rows at a time."""
    found = np.empty(gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kind), np.uint8)
    rows, flat = tensor.reshape(-1, tensor.shape[-1]), found.reshape(-1, found.shape[-1])
    step = max(1, AT_ONCE // tensor.shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        flat[start : start + step] = _bytes(part, kind)
        if kind is Type.F16 and not bool(torch.isfinite(part.half()).all()):
            raise ConfigError(f"'{name}' holds values beyond float16's largest; export it in bf16")
    return found


def _bytes(rows: Tensor, kind: Type) -> NDArray[np.uint8]:
    if kind in NATIVE:
        return np.asarray(rows.to(NATIVE[kind]).contiguous().view(torch.uint8).numpy())
    return np.asarray(gguf.quants.quantize(rows.float().numpy(), kind))


NATIVE = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
"""The types that torch rounds to itself, to the nearest."""


# ---------------------------------------------------------------------------------------------- proving


def _proved(path: Path, source: Source, shown: Path) -> float:
    """The largest error of a file's values."""
    reader = gguf.GGUFReader(path)
    held = {tensor.name: tensor for tensor in reader.tensors}
    for name, _ in further_tensors(source.settings, source.layout.family.architecture):
        held.pop(name)
    worst = 0.0
    for key, tensor in source.tensors():
        there = held.pop(source.layout.name(key))
        error = _error(there, source.layout, key, tensor)
        if not error <= ROUNDED[there.tensor_type]:
            raise ProofError(f"'{there.name}' of {shown}, read back, is off by {error:.3g} of its size; do not use it")
        worst = max(worst, error)
    if held:
        raise ProofError(f"{shown} holds tensors that the model has not: {', '.join(held)}")
    return worst


def _error(found: Any, layout: Layout, key: str, tensor: Tensor) -> float:
    """The largest difference, as a share of the largest value in the file."""
    there = torch.from_numpy(_decoded(found)).view(tensor.shape)
    largest, values = float(there.abs().max()), layout.stored_back(key, there)
    step = max(1, AT_ONCE // tensor.shape[-1])
    parts = zip(*(t.reshape(-1, tensor.shape[-1]).split(step) for t in (tensor, values)), strict=True)
    difference = max(float((a.float() - b).abs().max()) for a, b in parts)
    return difference / largest if largest else (0.0 if difference == 0 else float("inf"))


def _decoded(found: Any) -> NDArray[np.float32]:
    """The values of a tensor in the file, in float32."""
    values: NDArray[np.float32] = gguf.quants.dequantize(found.data, found.tensor_type)
    return values if values.flags.writeable else values.copy()
