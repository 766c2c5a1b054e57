"""twofold export ADAPTER --to gguf|gguf-q8_0|mlx|kohya|vllm -o OUT"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import Terminal, stdout
from twofold.recipes.export import MERGED, Format, export_adapter


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Write an adapter for another program.

    Attributes:
        adapter: its folder.
        to: `gguf` for llama.cpp and Ollama; `gguf-bf16`, `gguf-f16`, `gguf-q8_0` and `gguf-f32` for them too, merged into its
            base; `mlx` for mlx-lm; `kohya` for image tools; `vllm` for the command that serves it there.
        output: the file to write, which ends in .gguf or, for kohya, .safetensors; or the folder for mlx.
        base: its base, of which only the configuration is read unless it is merged; the one that the adapter names, if not given.
        base_gguf: with `gguf`, the base as a GGUF file, for Ollama's Modelfile; written if it is not there.
    """

    adapter: Positional[Path]
    to: Format
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    base: str | None = None
    base_gguf: Path | None = None


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(ExportFlags, arguments, verb="export", description="An adapter in another program's format, proved.")
    with Terminal() as terminal:
        found = export_adapter(flags.adapter, flags.to, flags.output, flags.base, flags.base_gguf, terminal)
    if as_json:
        print_json(found)
    elif "command" in found:
        stdout.print(found["command"], soft_wrap=True)
    else:
        stdout.print(_said(found))
        if "modelfile" in found:
            named = f"name the base in {found['modelfile']} (--base-gguf FILE does it, and writes the file), then "
            before = "" if found["modelfile_is_whole"] else named
            stdout.print(f"for Ollama: {before}ollama create NAME -f {found['modelfile']}")
    return 0


def _said(found: dict[str, Any]) -> str:
    """One sentence of what was written, and how it was proved."""
    difference = found["largest_difference"]
    if found["format"] in MERGED:
        proof = (
            "bit for bit the merged model" if difference == 0 else f"off by at most {difference:.1e} of a tensor's size"
        )
        return f"{found['output']} holds the base with the adapter merged in; read back, it is {proof}"
    proof = "bit for bit the adapter" if difference == 0 else f"the adapter to within {difference:.1e} of its size"
    return f"{found['output']} holds {found['modules']} modules; read back, it is {proof}"
