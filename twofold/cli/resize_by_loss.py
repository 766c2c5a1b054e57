"""twofold resize ADAPTER --tolerance 0.01 --data held_out.jsonl [--base B] -o OUT"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.table import Table
from tyro.conf import Positional, arg

from twofold.base.load import DEFAULT_BASE, Precision
from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import Terminal, stdout
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.rank_after import Tolerated, resize_by_loss


@dataclass(frozen=True, kw_only=True)
class ResizeByLossFlags:
    """The smallest rank that an adapter's held-out loss allows.

    Attributes:
        adapter: its folder.
        output: the folder to write.
        tolerance: share of the held-out loss by which it may rise.
        data: held-out data.
        base: what the adapter was trained on.
        dtype: type of the base's weights.
        device: `auto` takes a GPU where there is one.
    """

    adapter: Positional[Path]
    output: Annotated[Path, arg(aliases=["-o"])]
    tolerance: float
    data: str
    base: str = DEFAULT_BASE
    dtype: Precision = "auto"
    device: str = "auto"


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    description = "Cut an adapter to the smallest rank whose held-out loss stays within a tolerance."
    flags = parse(ResizeByLossFlags, arguments, verb="resize", description=description)
    asked = Tolerated(tolerance=flags.tolerance, data=flags.data)
    with Terminal() as terminal:
        base = load_with_adapters(flags.base, [str(flags.adapter)], flags.dtype, flags.device, terminal)
        found = resize_by_loss(base, flags.adapter, flags.output, asked, terminal)
    if as_json:
        print_json(found)
        return 0
    table = Table("r", "held-out loss", box=None, header_style="bold")
    for r, loss in found["losses"].items():
        table.add_row(f"{r}{' <' if int(r) == found['r'] else ''}", f"{loss:.4f}")
    stdout.print(table)
    stdout.print(
        f"rank {found['before']} to {found['r']}, within {flags.tolerance:.1%} of the loss; {found['output']} written"
    )
    return 0
