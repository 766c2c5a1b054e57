"""twofold sweep CONFIG.yaml --r 4,16,64 --learning-rate 1e-4..3e-3 [--seeds 3] [--resume]"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from tyro.conf import Positional

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import Terminal, duration, gigabytes, stdout
from twofold.recipes.grid import RANK, RATE, ranks, rates
from twofold.recipes.settings import read_config
from twofold.recipes.side_by_side import SideBySide
from twofold.recipes.sweep import Sweep, sweep
from twofold.recipes.words import NONE, shown

DESCRIPTION = (
    "Train a grid of adapters over one loaded base, give up hopeless learning rates on the way, and say which rank and rate to "
    "take. --resume goes on where it stopped, --json prints the report."
)


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """A grid of trainings.

    Attributes:
        config: the configuration of a run; its output, with -sweep behind it, is where all is written.
        r: ranks, as in 4,16,64.
        learning_rate: rates, as in 1e-4,1e-3 or 1e-4..3e-3 (two a power of ten) or 1e-4..3e-3:8.
        seeds: trainings of each setting; with one, nobody knows what is noise.
        how: how trainings share the machine.
        workers: processes on Ray that share the grid; 0 for this one alone.
        ray_address: of a running Ray, as in auto; without it one is started here.
    """

    config: Positional[Path]
    r: str | None = None
    learning_rate: str | None = None
    seeds: int = 1
    how: SideBySide = field(default_factory=SideBySide)
    workers: int = 0
    ray_address: str | None = None


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    arguments, resume = take(arguments, "--resume")
    flags = parse(SweepFlags, arguments, verb="sweep", description=DESCRIPTION, bare=("--json", "--resume"))
    axes: dict[str, list[Any]] = {} if flags.r is None else {RANK: list(ranks(flags.r))}
    axes |= {} if flags.learning_rate is None else {RATE: list(rates(flags.learning_rate))}
    asked = Sweep(axes=axes, seeds=flags.seeds, how=flags.how, workers=flags.workers, ray_address=flags.ray_address)
    with Terminal() as terminal:
        found = sweep(read_config(flags.config), asked, terminal, resume=resume)
    print_json(found) if as_json else _show(found)
    return 0


def _show(found: dict[str, Any]) -> None:
    names = list(found["axes"])
    table = Table(
        *(n.rpartition(".")[2] for n in names), "held-out loss", "±", "seeds", "", box=None, header_style="bold"
    )
    for score in found["scores"]:
        own = [f"{score['settings'][n]:g}" for n in names]
        state = NONE if score["finished"] else "given up"
        table.add_row(*own, shown(score["mean"], ".4f"), shown(score["spread"], ".4f"), str(score["seeds"]), state)
    stdout.print(table)
    advice = found["recommendation"]
    if advice["settings"] is None:
        stdout.print(advice["reason"])
    else:
        said = "  ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in advice["settings"].items())
        stdout.print(f"\n[bold]{said}[/bold]: loss {advice['mean']:.4f}, {advice['reason']}")
        stdout.print(f"  rates that do as well at this rank: {', '.join(f'{r:g}' for r in advice['rates'])}")
    stdout.print(
        f"  {found['steps']} steps in {duration(found['seconds'])}, peak {gigabytes(found['peak_memory_bytes'])}; "
        f"{found['sweep']}/losses.svg",
        soft_wrap=True,
    )
