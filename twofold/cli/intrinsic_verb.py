"""twofold intrinsic CONFIG.yaml [--search.dimensions 10 100 1000] [--search.projection fastfood] [--search.layers] [--resume]"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from tyro.conf import Positional

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import Terminal, duration, stdout
from twofold.recipes.intrinsic import Search, intrinsic
from twofold.recipes.settings import read_config
from twofold.recipes.words import NONE, shown

DESCRIPTION = (
    "The intrinsic dimension of a task: train a few numbers, spread over the whole model by a random map, and see how many reach "
    "90 % of what full fine-tuning reaches. training.learning_rate is that of full fine-tuning. --resume goes on where it stopped."
)


@dataclass(frozen=True, kw_only=True)
class IntrinsicFlags:
    """A task and the subspaces to train in.

    Attributes:
        config: the configuration of a run; its output, with -intrinsic behind it, is where all is written.
        search: the subspaces.
    """

    config: Positional[Path]
    search: Search = field(default_factory=Search)


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    arguments, resume = take(arguments, "--resume")
    flags = parse(IntrinsicFlags, arguments, verb="intrinsic", description=DESCRIPTION, bare=("--json", "--resume"))
    with Terminal() as terminal:
        found = intrinsic(read_config(flags.config), flags.search, terminal, resume=resume)
    print_json(found) if as_json else _show(found)
    return 0


def _show(found: dict[str, Any]) -> None:
    table = Table("dimension", "score", "±", "loss", "rate factor", box=None, header_style="bold")
    for p in found["curve"]:
        figures = (f"{p['score']:.3f}", shown(p["spread"], ".3f"), shown(p["loss"], ".4f"), f"{p['rate_factor']:g}")
        table.add_row(f"{p['d']:,}", *figures)
    for name in ("untouched", "full"):
        table.add_row(name, f"{found[name]['score']:.3f}", NONE, shown(found[name]["loss"], ".4f"), NONE)
    stdout.print(table)
    reached = (shown(found[k], ",") for k in ("d90", "d90_of_the_gain"))
    stdout.print("\n[bold]d90 {}[/bold] of the score, {} of the gain; a dash: none that was tried".format(*reached))
    stdout.print(
        f"  of {found['values']:,} values, in {duration(found['seconds'])}; {found['folder']}/curve.svg", soft_wrap=True
    )
