"""twofold export ADAPTER --to gguf|mlx|vllm -o OUT"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import stdout
from twofold.recipes.export import Format, export_adapter


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Write an adapter for another program.

    Attributes:
        adapter: its folder.
        to: `gguf` for llama.cpp and Ollama, `mlx` for mlx-lm, `vllm` for the command that serves it there.
        output: the .gguf file, or the folder for mlx, to write.
        base: its base, of which only the configuration is read; the one that the adapter names, if not given.
    """

    adapter: Positional[Path]
    to: Format
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    base: str | None = None


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(ExportFlags, arguments, verb="export", description="An adapter in another program's format, proved.")
    found = export_adapter(flags.adapter, flags.to, flags.output, flags.base)
    if as_json:
        print_json(found)
    elif "command" in found:
        stdout.print(found["command"], soft_wrap=True)
    else:
        same = found["largest_difference"] == 0
        proof = (
            "bit for bit the adapter"
            if same
            else f"the adapter to within {found['largest_difference']:.1e} of its size"
        )
        stdout.print(f"{found['output']} holds {found['modules']} modules; read back, it is {proof}")
        if "modelfile" in found:
            stdout.print(
                f"for Ollama: put the base into {found['modelfile']}, then ollama create NAME -f {found['modelfile']}"
            )
    return 0
