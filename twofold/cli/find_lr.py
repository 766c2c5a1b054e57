"""twofold train CONFIG.yaml --find-lr [--find-lr.steps 20 --find-lr.highest 1e-2 ...]"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rich.table import Table

from twofold.cli.flags import take
from twofold.cli.main import print_json
from twofold.cli.run_flags import SearchFlags, config_from
from twofold.cli.terminal import Terminal, duration, stdout
from twofold.recipes.find_lr import find_lr
from twofold.recipes.rate_page import verdict
from twofold.recipes.settings import TrainConfig
from twofold.recipes.words import shown


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = config_from(arguments, SearchFlags)
    config = TrainConfig(**{f.name: getattr(flags, f.name) for f in fields(TrainConfig)})
    with Terminal() as terminal:
        found = find_lr(config, flags.find_lr, terminal)
    print_json(found) if as_json else _show(found)
    return 0


def _show(found: dict[str, Any]) -> None:
    table = Table("learning rate", "loss", "held-out loss", "", box=None, header_style="bold", padding=(0, 2))
    for trial in found["trials"]:
        figures = (shown(trial[key], ".4f") for key in ("loss", "held_out_loss"))
        table.add_row(f"{trial['learning_rate']:g}", *figures, verdict(trial, found))
    stdout.print(table)
    rate = found["suggested_learning_rate"]
    stdout.print(f"\n[bold]{f'learning rate {rate:g}' if rate else 'no rate to suggest'}[/bold]: {found['reason']}")
    stdout.print(
        f"  {len(found['trials'])} rates in {duration(found['seconds'])}   page {found['page']}", soft_wrap=True
    )
    if rate:
        stdout.print(f"  train with --training.learning-rate {rate:g}")
