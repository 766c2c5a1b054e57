"""twofold inspect ADAPTER"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from tyro.conf import Positional

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import stdout
from twofold.inspection.report import AdapterReport
from twofold.recipes.inspect import inspect_adapter


@dataclass(frozen=True, kw_only=True)
class InspectFlags:
    """Look into an adapter.

    Attributes:
        adapter: its folder.
    """

    adapter: Positional[Path]


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(InspectFlags, arguments, verb="inspect", description="Norms and ranks of an adapter, by module.")
    found = inspect_adapter(flags.adapter)
    print_json(found.as_json()) if as_json else _show(found)
    return 0


def _show(found: AdapterReport) -> None:
    columns = ("module", "r", "scale", "norm", "largest", "stable rank", "effective rank", "99 % energy at")
    table = Table(*columns, box=None, header_style="bold")
    for m in found.modules:
        norms = (f"{m.frobenius_norm:.3g}", f"{m.spectral_norm:.3g}", f"{m.stable_rank:.1f}", f"{m.effective_rank:.1f}")
        table.add_row(m.name, str(m.r), f"{m.scale:g}", *norms, str(m.energy_rank_99))
    stdout.print(table)
    for finding in found.findings:
        stdout.print(f"{finding.severity}: {finding.message} ({finding.code})")
    stdout.print(f"rank {found.suggested_rank} keeps 99 % of the energy in every module (now r={found.r})")
