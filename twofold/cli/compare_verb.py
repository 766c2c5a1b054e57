"""twofold compare ADAPTER ADAPTER [--html FILE]"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.module_tables import ModuleTable
from twofold.cli.terminal import stdout
from twofold.inspection.compare import Comparison, ModuleComparison
from twofold.recipes.adapter_pages import write_comparison
from twofold.recipes.inspect import compare


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """Set two adapters side by side.

    Attributes:
        first: folder of the one.
        second: folder of the other.
        html: write a page with maps and phi grids, which opens without a network.
    """

    first: Positional[Path]
    second: Positional[Path]
    html: Path | None = None


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(
        CompareFlags, arguments, verb="compare", description="How alike two adapters' updates are, by module."
    )
    found = compare(flags.first, flags.second)
    if flags.html:
        write_comparison(flags.html, (flags.first.name, flags.second.name), found)
    print_json(found.as_json()) if as_json else _show(found)
    return 0


def _show(found: Comparison) -> None:
    columns = ("cosine", "norms", "output space", "by chance", "input space", "by chance")
    table = ModuleTable([m.name for m in found.modules], columns)
    for m in found.modules:
        table.add(m.name, f"{m.cosine:.3f}", " / ".join(f"{n:.3g}" for n in m.norms), *_spaces(m))
    stdout.print(table.drawn)
    for which, names in (("first", found.only_first), ("second", found.only_second)):
        if names:
            stdout.print(f"in the {which} alone: {', '.join(names)}")
    if found.whole:
        stdout.print(f"held whole, and no part of these figures, but different: {', '.join(found.whole)}")
    for name, (a, b) in found.config.items():
        stdout.print(f"{name}: {a} / {b}")
    stdout.print(f"cosine of all updates together {found.cosine:.3f}; spaces: 1 is the same, beside what chance gives")


def _spaces(m: ModuleComparison) -> tuple[str, ...]:
    pairs = ((m.output_similarity, m.output_baseline), (m.input_similarity, m.input_baseline))
    return tuple(
        text for phi, chance in pairs for text in (f"{phi[-1][-1]:.3f}" if phi and phi[-1] else "-", f"{chance:.3f}")
    )
