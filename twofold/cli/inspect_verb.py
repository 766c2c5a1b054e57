"""twofold inspect ADAPTER [--base B [--intruders [--exact]]] [--html FILE]"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text
from tyro.conf import Positional

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.module_tables import ModuleTable
from twofold.cli.terminal import Terminal, stdout
from twofold.inspection.lint import Finding
from twofold.inspection.report import AdapterReport, ModuleReport
from twofold.recipes.adapter_pages import write_inspection
from twofold.recipes.inspect import DIRECTIONS, inspect_adapter

DESCRIPTION = (
    "Norms, ranks and findings of an adapter, by module; with --base, also its size beside the weights and how much it amplifies "
    "its own directions."
)
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
TOLD = 3
"""How many findings of one code are told."""


@dataclass(frozen=True, kw_only=True)
class InspectFlags:
    """Look into an adapter.

    Attributes:
        adapter: its folder.
        base: the base that it changes, read one weight at a time.
        intruders: with --base, how many of the ten largest directions of each changed weight are new.
        exact: find intruders by whole decompositions of every weight, which takes very long.
        html: write a page with maps and spectra, which opens without a network.
    """

    adapter: Positional[Path]
    base: str | None = None
    intruders: bool = False
    exact: bool = False
    html: Path | None = None


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(InspectFlags, arguments, verb="inspect", description=DESCRIPTION)
    directions = DIRECTIONS if flags.intruders else 0
    with Terminal() as terminal:
        found = inspect_adapter(flags.adapter, flags.base, intruders=directions, exact=flags.exact, emit=terminal)
    if flags.html:
        write_inspection(flags.html, flags.adapter.name, found)
    print_json(found.as_json()) if as_json else _show(found)
    return 0


def _show(found: AdapterReport) -> None:
    with_base = any(m.beside_base for m in found.modules)
    columns = [
        "r",
        "scale",
        "norm",
        "largest",
        "stable rank",
        "effective rank",
        "90 %",
        "95 %",
        "99 % of energy",
    ]
    columns += ["of W", "of W's largest", "amplified", "intruders"] if with_base else []
    table = ModuleTable([m.name for m in found.modules], columns)
    for m in found.modules:
        table.add(m.name, *_row(m), *(_beside(m) if with_base else ()))
    if (total := found.total) is not None:
        norms = (
            f"{total.frobenius_norm:.3g}",
            f"{total.spectral_norm:.3g}",
            f"{total.stable_rank:.1f}",
            f"{total.effective_rank:.1f}",
        )
        ranks = (total.energy_rank_90, total.energy_rank_95, total.energy_rank_99)
        table.drawn.add_row("all together", str(total.r), "", *norms, *map(str, ranks), style="bold")
    stdout.print(table.drawn)
    _tell(found.findings)
    stdout.print(f"rank {found.suggested_rank} keeps 99 % of the energy in every module (now r={found.r})")


def _row(m: ModuleReport) -> tuple[str, ...]:
    norms = (f"{m.frobenius_norm:.3g}", f"{m.spectral_norm:.3g}", f"{m.stable_rank:.1f}", f"{m.effective_rank:.1f}")
    return (str(m.r), f"{m.scale:g}", *norms, *map(str, (m.energy_rank_90, m.energy_rank_95, m.energy_rank_99)))


def _beside(m: ModuleReport) -> tuple[str, ...]:
    b = m.beside_base
    if b is None:
        return ("-",) * 4
    sizes = (f"{b.relative_norm:.2%}", f"{b.relative_spectral_norm:.2%}", f"{b.amplification:.1f}")
    return (*sizes, "-" if b.intruders is None else str(b.intruders))


def _tell(findings: Sequence[Finding]) -> None:
    """The gravest first, and of many with one code some."""
    by_code: dict[tuple[str, str], list[str]] = {}
    for one in sorted(findings, key=lambda one: [*STYLES].index(one.severity)):
        by_code.setdefault((one.severity, one.code), []).append(one.message)
    for (severity, code), messages in by_code.items():
        shown = messages if len(messages) <= TOLD + 1 else messages[:TOLD]
        for message in shown:
            stdout.print(Text(f"{severity}: {message} ({code})", style=STYLES[severity]))
        if left := len(messages) - len(shown):
            stdout.print(Text(f"{severity}: {left} modules more ({code}); --json names them", style=STYLES[severity]))
