"""twofold inspect ADAPTER [--base B [--intruders [--exact]]] [--html FILE]"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import Terminal, stdout
from twofold.inspection.lint import Finding
from twofold.inspection.report import AdapterReport, ModuleReport
from twofold.recipes.adapter_pages import write_inspection
from twofold.recipes.inspect import DIRECTIONS, inspect_adapter

DESCRIPTION = (
    "Norms, ranks and findings of an adapter, by module. With --base, also its size beside the weights, how much it amplifies "
    "its own directions and, with --intruders, how many of the ten largest directions of each changed weight are new; --exact "
    "finds these by whole decompositions, which takes very long."
)
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


@dataclass(frozen=True, kw_only=True)
class InspectFlags:
    """Look into an adapter.

    Attributes:
        adapter: its folder.
        base: the base that it changes, read one weight at a time.
        html: write a page with maps and spectra, which opens without a network.
    """

    adapter: Positional[Path]
    base: str | None = None
    html: Path | None = None


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    arguments, new = take(arguments, "--intruders")
    arguments, exact = take(arguments, "--exact")
    bare = ("--json", "--intruders", "--exact")
    flags = parse(InspectFlags, arguments, verb="inspect", description=DESCRIPTION, bare=bare)
    with Terminal() as terminal:
        directions = DIRECTIONS if new else 0
        found = inspect_adapter(flags.adapter, flags.base, intruders=directions, exact=exact, emit=terminal)
    if flags.html:
        write_inspection(flags.html, flags.adapter.name, found)
    print_json(found.as_json()) if as_json else _show(found)
    return 0


def _show(found: AdapterReport) -> None:
    with_base = any(m.beside_base for m in found.modules)
    columns = [
        "module",
        "r",
        "scale",
        "norm",
        "largest",
        "stable rank",
        "effective rank",
        "90 %",
        "95 %",
        "99 % energy at",
    ]
    columns += ["of W", "of W's largest", "amplified", "intruders"] if with_base else []
    table = Table(*columns, box=None, header_style="bold")
    for m in found.modules:
        table.add_row(*_row(m), *(_beside(m) if with_base else ()))
    if (total := found.total) is not None:
        norms = (
            f"{total.frobenius_norm:.3g}",
            f"{total.spectral_norm:.3g}",
            f"{total.stable_rank:.1f}",
            f"{total.effective_rank:.1f}",
        )
        ranks = (total.energy_rank_90, total.energy_rank_95, total.energy_rank_99)
        table.add_row("all together", str(total.r), "", *norms, *map(str, ranks), style="bold")
    stdout.print(table)
    for finding in found.findings:
        _tell(finding)
    stdout.print(f"rank {found.suggested_rank} keeps 99 % of the energy in every module (now r={found.r})")


def _row(m: ModuleReport) -> tuple[str, ...]:
    norms = (f"{m.frobenius_norm:.3g}", f"{m.spectral_norm:.3g}", f"{m.stable_rank:.1f}", f"{m.effective_rank:.1f}")
    return (m.name, str(m.r), f"{m.scale:g}", *norms, *map(str, (m.energy_rank_90, m.energy_rank_95, m.energy_rank_99)))


def _beside(m: ModuleReport) -> tuple[str, ...]:
    b = m.beside_base
    if b is None:
        return ("-",) * 4
    sizes = (f"{b.relative_norm:.2%}", f"{b.relative_spectral_norm:.2%}", f"{b.amplification:.1f}")
    return (*sizes, "-" if b.intruders is None else str(b.intruders))


def _tell(finding: Finding) -> None:
    stdout.print(Text(f"{finding.severity}: {finding.message} ({finding.code})", style=STYLES[finding.severity]))
