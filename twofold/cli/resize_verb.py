"""twofold resize ADAPTER --r 8 | --energy 0.99 | --ratio 100 | --tolerance 0.01 --data FILE -o OUT"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from twofold.cli import resize_by_loss
from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.module_tables import ModuleTable
from twofold.cli.terminal import Terminal, stdout
from twofold.merging.resize import Size
from twofold.recipes.resize import resize

DESCRIPTION = (
    "An adapter at other ranks, and what that loses. --tolerance SHARE --data FILE measures the held-out loss at each smaller "
    "rank instead, and takes the smallest that raises it no more (--tolerance --help)."
)


@dataclass(frozen=True, kw_only=True)
class ResizeFlags:
    """The best adapter of smaller ranks.

    Attributes:
        adapter: its folder.
        output: the folder to write.
        r: rank of every module, at most what it has.
        energy: share of the squared Frobenius norm that every module keeps, at the smallest rank that does.
        ratio: keep the directions whose singular value is at least the module's largest over this.
    """

    adapter: Positional[Path]
    output: Annotated[Path, arg(aliases=["-o"])]
    r: int | None = None
    energy: float | int | None = None
    ratio: float | int | None = None


def run(arguments: list[str]) -> int:
    if any(a.partition("=")[0] == "--tolerance" for a in arguments):
        return resize_by_loss.run(arguments)
    arguments, as_json = take(arguments, "--json")
    flags = parse(ResizeFlags, arguments, verb="resize", description=DESCRIPTION, bare=("--json", "--tolerance"))
    size = Size(r=flags.r, energy=flags.energy, ratio=flags.ratio)
    with Terminal() as terminal:
        found = resize(flags.adapter, flags.output, size, terminal)
    if as_json:
        print_json(found)
        return 0
    table = ModuleTable([m["name"] for m in found["modules"]], ("r", "lost"))
    for m in found["modules"]:
        table.add(m["name"], f"{m['before']} → {m['r']}", f"{m['lost']:.3%}")
    stdout.print(table.drawn)
    stdout.print(
        f"rank {found['before']} to {found['r']} at most; {found['lost']:.3%} of the energy lost; {found['output']} written"
    )
    return 0
