"""A LoRA adapter as a GGUF file, which llama.cpp and Ollama load beside a base.

llama.cpp multiplies each update by `adapter.lora.alpha` over the rank of the tensor at hand. One alpha is in the file, so wherever
the true scale is another one (rsLoRA with ranks of its own, patterns), the rest is folded into B; the same bits otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
from torch import Tensor

from twofold import atomic
from twofold.errors import ConfigError, RunError
from twofold.lowrank.factors import LowRank
from twofold.merging.export.factors import commonest, prove, with_scale
from twofold.merging.export.gguf_layout import Layout, as_tensor


def write_gguf_adapter(updates: Mapping[str, LowRank], layout: Layout, path: Path, name: str) -> float:
    """Write the file, read it back, and compare: the largest relative difference, 0 unless scales were folded in.

    Raises:
        ConfigError: llama.cpp has no tensor for a module.
        RunError: the file cannot be written.
        ProofError: what was read back is something else.
    """
    alpha = commonest([update.scale * update.rank for update in updates.values()])
    if path.suffix != ".gguf":
        raise ConfigError(f"{path} should be a file that ends in .gguf")
    tensors: dict[str, Tensor] = {}
    for module, update in updates.items():
        key = f"{module}.weight"
        tensors[f"{layout.name(key)}.lora_a"] = update.A
        tensors[f"{layout.name(key)}.lora_b"] = layout.rows(key, with_scale(update, alpha / update.rank))
    with atomic.new_file(path) as temporary:
        _write(tensors, alpha, layout, temporary, name)
        try:
            written = read_gguf_adapter(temporary, layout, updates)
        except ValueError as error:  # numpy does not tell of every write that a full disk cuts short
            raise RunError(f"cannot write {path}: it came out short; free space or choose another place") from error
        return prove(updates, written, str(path))


def _write(tensors: Mapping[str, Tensor], alpha: float, layout: Layout, path: Path, name: str) -> None:
    writer = gguf.GGUFWriter(path, layout.family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_adapter(path: Path, layout: Layout, modules: Mapping[str, object]) -> dict[str, LowRank]:
    """The updates in a file as llama.cpp would apply them, by the modules asked for."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].parts[-1][0])
    held = {tensor.name: tensor.data for tensor in reader.tensors}
    found = {}
    for module in modules:
        key = f"{module}.weight"
        A, B = (as_tensor(held.pop(f"{layout.name(key)}.{end}")) for end in ("lora_a", "lora_b"))
        found[module] = LowRank(A, layout.rows_back(key, B), alpha / len(A))
    return found | {f"{left} in the file": LowRank(as_tensor(held[left]), as_tensor(held[left]), 1.0) for left in held}
