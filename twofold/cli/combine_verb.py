"""twofold combine A:0.7 B:0.3 --method svd --r 16 -o OUT"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.module_tables import ModuleTable
from twofold.cli.terminal import Terminal, stdout
from twofold.errors import ConfigError
from twofold.merging.methods import Combination
from twofold.recipes.adapters import parse_adapter
from twofold.recipes.combine import combine

NOTHING = 1e-12
"""The share of the energy below which a loss is rounding."""
DESCRIPTION = (
    "One adapter out of several, by their true updates. Methods: cat (exact, ranks add up), svd (the best of rank r), linear "
    "(exact or refused), ties, dare_linear, dare_ties, magnitude_prune."
)


@dataclass(frozen=True, kw_only=True)
class CombineFlags(Combination):
    """Adapters of one base as one.

    Attributes:
        adapters: folders, each with its weight after a colon (1 if there is none; it may be negative).
        output: the folder to write.
        preview: write nothing, and say where they overlap, where they conflict and what is lost.
        base: needed only where adapters hold biases or whole modules and their weights do not add up to 1.
        seed: of dare's draws.
        allow_foreign_base: combine adapters that were trained on different bases.
    """

    adapters: Positional[tuple[str, ...]] = ()
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    preview: bool = False
    base: str | None = None
    seed: int = 0
    allow_foreign_base: bool = False


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(CombineFlags, arguments, verb="combine", description=DESCRIPTION)
    if flags.output is None and not flags.preview:
        raise ConfigError("name the folder to write with -o, or take --preview to write nothing")
    with Terminal() as terminal:
        found = combine(
            _weights(flags.adapters),
            None if flags.preview else flags.output,
            method=flags.method,
            r=flags.r,
            density=flags.density,
            base=flags.base,
            seed=flags.seed,
            allow_foreign_base=flags.allow_foreign_base,
            emit=terminal,
        )
    print_json(found) if as_json else _show(found)
    return 0


def _weights(adapters: tuple[str, ...]) -> dict[str | Path, float]:
    found: dict[str | Path, float] = {}
    for folder, weight in map(parse_adapter, adapters):
        if folder in found:
            raise ConfigError(f"{folder} is named twice; give it one weight")
        found[folder] = weight
    return found


def _show(found: Mapping[str, Any]) -> None:
    modules = found["modules"]
    columns = (
        "adapters",
        "r",
        "norm",
        "lost",
        "off the sum",
        "99 % at",
        "cosine",
        "overlap",
        "by chance",
        "conflict",
    )
    table = ModuleTable([m["name"] for m in modules], columns)
    for m in modules:
        between = (_figure(m[key], ".2f") for key in ("cosine", "overlap", "by_chance"))
        made = (f"{m['r']}", f"{m['norm']:.3g}", f"{m['lost']:.2%}", f"{m['off']:.1%}", f"{m['needed']}")
        table.add(m["name"], f"{m['adapters']}", *made, *between, f"{m['conflict']:.2f}")
    stdout.print(table.drawn)
    worst = max(modules, key=lambda m: float(m["lost"]))
    lost = "no energy lost"
    if found["lost"] > NOTHING:
        lost = f"{found['lost']:.2%} of the energy lost, the largest share ({worst['lost']:.2%}) in {worst['name']}"
    stdout.print(f"{found['method']}: rank {found['r']}; {lost}")
    stdout.print("nothing written" if found["output"] is None else f"{found['output']} written")


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
