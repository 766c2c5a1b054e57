"""`twofold export`: an adapter in the formats of other programs, each file read back and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from twofold import atomic
from twofold.adapter.files import AdapterFiles
from twofold.adapter.shapes import ModuleShape, module_shapes
from twofold.adapter.updates import open_updates
from twofold.base.known_shapes import KNOWN_SHAPES
from twofold.base.load import BUILT_IN, locate
from twofold.base.mapped import NotMapped, map_base
from twofold.base.shapes import meta_model
from twofold.base.stored import open_stored
from twofold.errors import AdapterFileError, ConfigError, RunError
from twofold.events import Emit, silent
from twofold.lowrank.factors import LowRank
from twofold.merging.disk import NotStreamed, Replay, plan_replay
from twofold.merging.export.factors import plain_factors
from twofold.merging.export.gguf_adapter import write_gguf_adapter
from twofold.merging.export.gguf_layout import Layout
from twofold.merging.export.gguf_model import Source, Values, write_gguf_model
from twofold.merging.export.kohya import write_kohya
from twofold.merging.export.mlx import write_mlx
from twofold.merging.export.vllm import vllm_command
from twofold.recipes.adapters import Asked
from twofold.recipes.provenance import compare_copies

Format = Literal["gguf", "gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0", "mlx", "kohya", "vllm"]
MERGED: dict[Format, Values] = {"gguf-f32": "f32", "gguf-f16": "f16", "gguf-bf16": "bf16", "gguf-q8_0": "q8_0"}
WORDS: dict[Format, str] = {"gguf": "a GGUF adapter", "mlx": "an MLX adapter", "vllm": "vLLM"}


def export_adapter(
    adapter: Path,
    to: Format,
    output: Path | None,
    base: str | None = None,
    base_gguf: Path | None = None,
    emit: Emit = silent,
) -> dict[str, Any]:
    """Write an adapter in another format, and prove it; for vLLM, which reads it as it is, say the command that serves it.

    Args:
        output: a file that ends in .gguf or, for kohya, in .safetensors, or a folder for mlx; none for vllm.
        base: of which only the configuration is read, unless it is merged; the one that the adapter names, if not given.
        base_gguf: for gguf, the base as a GGUF file, which the Modelfile then names; written in the base's own type if it is not
            there.

    Raises:
        ConfigError: the adapter is more than the format can hold, or there is no output where one is needed.
        AdapterFileError: the adapter is damaged, or not of this base.
        RunError: the output exists or cannot be written.
        ProofError: what was written, read back, is not the adapter.
    """
    files = open_updates(adapter)
    if to != "vllm":
        _check_output(output, to)
    elif output is not None:
        raise ConfigError("vLLM reads an adapter's folder as it is, so nothing is written for it; leave out --output")
    if base_gguf is not None and to != "gguf":
        raise ConfigError("base_gguf is the base that a GGUF adapter's Modelfile names; it goes with --to gguf alone")
    if to in MERGED and output is not None:
        return {"format": to, **_merged(files, MERGED[to], output, base, emit)}
    compare_copies([files], None, emit)
    if to == "kohya" and output is not None:
        difference = write_kohya(files, output)
        return {"format": to, "output": str(output), "modules": len(files.modules()), "largest_difference": difference}
    updates = plain_factors(files, WORDS[to])
    reference = _base_of(files, base)
    model = meta_model(_shapes_of(reference))
    _check_fits(files, updates, module_shapes(model))
    told: dict[str, Any] = {"format": to, "modules": len(updates), "r": max(update.rank for update in updates.values())}
    name = base or files.base_name or reference
    if output is None:
        return told | {"command": vllm_command(files, updates, name, adapter.resolve().name)}
    told |= {"output": str(output)}
    if to == "mlx":
        return told | {"largest_difference": write_mlx(updates, model.config.num_hidden_layers, output)}
    told |= _base_beside(reference, base_gguf, emit)
    difference = write_gguf_adapter(updates, Layout.of(model.config), output, adapter.resolve().name)
    told |= {"largest_difference": difference}
    modelfile = output.with_suffix(".Modelfile")
    atomic.write_text(modelfile, _modelfile(name, output, base_gguf or _named(name)))
    return told | {"modelfile": str(modelfile), "modelfile_is_whole": (base_gguf or _named(name)) is not None}


def _check_output(output: Path | None, to: Format) -> None:
    if output is None:
        raise ConfigError("--output is missing: where to write; see twofold export --help")
    for path in (output, output.with_suffix(".Modelfile")) if to.startswith("gguf") else (output,):
        if path.exists():
            raise RunError(f"{path} exists already; choose another output or remove it first")


def _base_of(files: AdapterFiles, given: str | None) -> str:
    """What the base is called, here where it is built in."""
    name = given or files.base_name
    if name is None:
        raise ConfigError(f"{files.path} does not name its base; say it with --base")
    return {b.hub_id: n for n, b in BUILT_IN.items()}.get(name, name)


def _shapes_of(reference: str) -> str:
    """A reference from which a configuration can be had, without the hub where it is known here."""
    return {known.hub_id: name for name, known in KNOWN_SHAPES.items()}.get(reference, reference)


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


# ---------------------------------------------------------------------------------------------- whole models


def _merged(files: AdapterFiles, values: Values, output: Path, base: str | None, emit: Emit) -> dict[str, Any]:
    """The base with the adapter merged in as one GGUF file, streamed from the base's."""
    asked = Asked(base=_base_of(files, base), adapters=(str(files.path),))
    try:
        running = asked.mapped(emit)
        replay = plan_replay(running.model, open_stored(running.reference))
    except (NotStreamed, NotMapped) as reason:
        raise ConfigError(
            f"{reason}; merge the adapter first (twofold merge), and use llama.cpp's own convert_hf_to_gguf.py on that"
        ) from reason
    template = running.renderer.template
    changed = template if template != running.tokenizer.chat_template else None
    source = Source.of(replay, running.model.config, running.tokenizer, changed)
    _check_writes_text(running.model)
    difference = write_gguf_model(source, output, values, output.stem, emit)
    modelfile = output.with_suffix(".Modelfile")
    atomic.write_text(modelfile, f"FROM ./{output.name}\n")
    return {
        "output": str(output),
        "tensors": len(replay.base.shapes) + len(replay.added),
        "changed": len(replay.changed),
        "largest_difference": difference,
        "modelfile": str(modelfile),
        "modelfile_is_whole": True,
    }


def _check_writes_text(model: Any) -> None:
    if not type(model).__name__.endswith("ForCausalLM"):
        raise ConfigError(
            f"llama.cpp generates text, and a {type(model).__name__} does not; use the merged folder (twofold merge)"
        )


def _base_beside(reference: str, path: Path | None, emit: Emit) -> dict[str, Any]:
    """The base itself as a GGUF file, if one is asked for that is not there."""
    if path is None or path.exists():
        return {}
    mapped = map_base(reference, emit)
    stored = open_stored(reference)
    own: dict[str, Values] = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}
    source = Source.of(Replay(stored, {}), mapped.model.config, mapped.tokenizer)
    write_gguf_model(source, path, own[str(mapped.dtype)], Path(locate(reference)).name, emit)
    return {"base_gguf": str(path)}


def _named(base: str) -> Path | None:
    """The base's GGUF file, where that is how it is named."""
    return Path(base) if base.endswith(".gguf") else None


def _modelfile(base: str, adapter: Path, base_gguf: Path | None) -> str:
    """For `ollama create`; where no GGUF file of the base is known, whoever runs it must put in one, or Ollama's name of it."""
    if base_gguf is not None:
        beside = base_gguf.resolve().parent == adapter.resolve().parent
        return f"FROM {f'./{base_gguf.name}' if beside else base_gguf.resolve()}\nADAPTER ./{adapter.name}\n"
    return (
        f"# The same base as the adapter's ({base}), as a GGUF file or by its name in Ollama's library.\n"
        f"FROM ./{Path(base).name}.gguf\nADAPTER ./{adapter.name}\n"
    )
