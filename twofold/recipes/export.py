"""`twofold export`: an adapter in the formats of other programs, each file read back and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from twofold import atomic
from twofold.adapter.files import AdapterFiles, open_adapter
from twofold.adapter.target import ModuleShape, module_shapes
from twofold.base.known_shapes import KNOWN_SHAPES
from twofold.base.load import BUILT_IN
from twofold.base.shapes import meta_model
from twofold.errors import AdapterFileError, ConfigError
from twofold.lowrank.factors import LowRank
from twofold.merging.export.factors import plain_factors
from twofold.merging.export.gguf_adapter import write_gguf_adapter
from twofold.merging.export.gguf_layout import Layout
from twofold.merging.export.mlx import write_mlx
from twofold.merging.export.vllm import vllm_command

Format = Literal["gguf", "mlx", "vllm"]


def export_adapter(adapter: Path, to: Format, output: Path | None, base: str | None = None) -> dict[str, Any]:
    """Write an adapter in another format, and prove it; for vLLM, which reads it as it is, say the command that serves it.

    Args:
        output: a file that ends in .gguf, or a folder for mlx; none for vllm.
        base: of which only the configuration is read; the one that the adapter names, if not given.

    Raises:
        ConfigError: the adapter is more than the format can hold, or there is no output where one is needed.
        AdapterFileError: the adapter is damaged, or not of this base.
        ProofError: what was written, read back, is not the adapter.
    """
    files = open_adapter(adapter)
    updates = plain_factors(files, WORDS[to])
    reference = _base_of(files, base)
    model = meta_model(reference)
    _check_fits(files, updates, module_shapes(model))
    told: dict[str, Any] = {"format": to, "modules": len(updates), "r": max(update.rank for update in updates.values())}
    if to == "vllm":
        name = base or files.base_name or reference
        return told | {"command": vllm_command(files, updates, name, adapter.name)}
    if output is None:
        raise ConfigError("--output is missing: where to write; see twofold export --help")
    told |= {"output": str(output)}
    if to == "mlx":
        return told | {"largest_difference": write_mlx(updates, model.config.num_hidden_layers, output)}
    difference = write_gguf_adapter(updates, Layout.of(model.config), output, adapter.name)
    modelfile = output.with_suffix(".Modelfile")
    atomic.write_text(modelfile, _modelfile(base or files.base_name or reference, output))
    return told | {"largest_difference": difference, "modelfile": str(modelfile)}


WORDS: dict[Format, str] = {"gguf": "a GGUF adapter", "mlx": "an MLX adapter", "vllm": "vLLM"}


def _base_of(files: AdapterFiles, given: str | None) -> str:
    """A reference from which a configuration can be had, without the hub where it is known here."""
    name = given or files.base_name
    if name is None:
        raise ConfigError(f"{files.path} does not name its base; say it with --base")
    known = {b.hub_id: n for n, b in BUILT_IN.items()} | {k.hub_id: n for n, k in KNOWN_SHAPES.items()}
    return known.get(name, name)


def _check_fits(files: AdapterFiles, updates: Mapping[str, LowRank], shapes: Mapping[str, ModuleShape]) -> None:
    problems = []
    for module, update in updates.items():
        shape, found = shapes.get(module), (update.A.shape[1], update.B.shape[0])
        if shape is None:
            problems.append(f"no module '{module}' in this base")
        elif (shape.in_features, shape.out_features) != found:
            problems.append(
                f"'{module}' maps {found[0]} to {found[1]}, but {shape.in_features} to {shape.out_features} in this base"
            )
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise AdapterFileError(
            f"{files.path} is not of this base: {'; '.join(problems[:4])}{more}; name its own with --base"
        )


def _modelfile(base: str, adapter: Path) -> str:
    """For `ollama create`: only the base in a form that Ollama has must be put in by whoever runs it."""
    return (
        f"# The same base as the adapter's ({base}), as a GGUF file or by its name in Ollama's library.\n"
        f"FROM {base if base.endswith('.gguf') else f'./{Path(base).name}.gguf'}\nADAPTER ./{adapter.name}\n"
    )
