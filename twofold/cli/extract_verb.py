"""twofold extract --base B --tuned T --r 32 | --energy 0.9 -o OUT [--exact]"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from twofold.adapter.target import PRESETS
from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.module_tables import ModuleTable
from twofold.cli.terminal import Terminal, duration, stdout
from twofold.merging.extract import Extraction
from twofold.recipes.extract import extract


@dataclass(frozen=True, kw_only=True)
class ExtractFlags(Extraction):
    """An adapter out of a full fine-tune.

    Attributes:
        base: the base that was fine-tuned: a Hugging Face directory, a hub id, a `.gguf` file or a built-in name.
        tuned: the fine-tune.
        output: the folder to write.
        target_modules: suffixes of the modules that get updates, or a preset: all-linear, attention, mlp.
        seed: of the sampled decompositions.
    """

    base: str
    tuned: str
    output: Annotated[Path, arg(aliases=["-o"])]
    target_modules: tuple[str, ...] = ("all-linear",)
    seed: int = 0


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(ExtractFlags, arguments, verb="extract", description="The best low-rank update of a full fine-tune.")
    names = flags.target_modules
    preset = len(names) == 1 and names[0] in PRESETS
    with Terminal() as terminal:
        found = extract(
            flags.base,
            flags.tuned,
            flags.output,
            Extraction(r=flags.r, energy=flags.energy, exact=flags.exact),
            target_modules=names[0] if preset else names,
            seed=flags.seed,
            emit=terminal,
        )
    if as_json:
        print_json(found)
        return 0
    table = ModuleTable([m["name"] for m in found["modules"]], ("r", "change", "lost"))
    for m in found["modules"]:
        table.add(m["name"], f"{m['r']}", f"{m['norm']:.3g}", f"{m['lost']:.2%}")
    stdout.print(table.drawn)
    stdout.print(
        f"{found['output']} written in {duration(found['seconds'])}: rank {found['r']} at most; {found['lost']:.2%} of these "
        f"modules' change lost, and {found['not_carried']['share']:.2%} of the whole change lies in other tensors"
    )
    return 0
