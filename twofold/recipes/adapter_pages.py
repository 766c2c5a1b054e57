"""The pages of `twofold inspect --html` and `twofold compare --html`: one file each, which opens without a network."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twofold import atomic
from twofold.inspection.compare import Comparison, ModuleComparison
from twofold.inspection.report import AdapterReport, ModuleReport
from twofold.recipes.charts import Chart, Figure, Line, Number, draw, significant
from twofold.recipes.pages import template
from twofold.recipes.words import NONE, Table

FAINTEST = -8
"""The power of ten, beside a module's largest value, below which its spectrum is not drawn."""
GRIDS = 24
"""The most phi grids that are drawn, of the most alike modules."""


@dataclass(frozen=True)
class Cell:
    """One square: how strongly it is coloured, from 0 to 1, what it says, and what it tells on hovering."""

    heat: float
    text: str
    tip: str = ""


@dataclass(frozen=True)
class Heat:
    """A map of squares; None where there is nothing."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]


def write_inspection(path: Path, name: str, found: AdapterReport) -> None:
    """Write the page of an adapter.

    Raises:
        RunError: the file cannot be written.
    """
    page = template("inspect.html.j2", {}).render(
        name=name,
        headline=f"Rank {found.suggested_rank} keeps 99 % of every module's energy; it has {found.r}",
        findings=found.findings,
        maps=_maps(found),
        spectra=_spectra(found.modules),
        modules=_modules(found),
    )
    atomic.write_text(path, page)


def write_comparison(path: Path, names: tuple[str, str], found: Comparison) -> None:
    """Write the page of two adapters.

    Raises:
        RunError: the file cannot be written.
    """
    alike = sorted(found.modules, key=lambda m: -_corner(m.output_similarity))[:GRIDS]
    differing = [[key, str(a), str(b)] for key, (a, b) in found.config.items()]
    page = template("compare.html.j2", {}).render(
        names=names,
        headline=f"Cosine {found.cosine:.3f} of all updates together",
        cosines=heat_map("Cosine of the updates", _of(found.modules, lambda m: m.cosine), "+.2f"),
        overlap=heat_map(
            "Output spaces: the share of the smaller one that lies in the larger",
            _of(found.modules, lambda m: _corner(m.output_similarity)),
            ".2f",
        ),
        grids=[
            (m.name, _grid(m.output_similarity, m.output_baseline), _grid(m.input_similarity, m.input_baseline))
            for m in alike
        ],
        hidden=len(found.modules) - len(alike),
        whole=found.whole,
        only=[(which, only) for which, only in zip(names, (found.only_first, found.only_second), strict=True) if only],
        config=Table("Settings that differ", ["Setting", *names], differing) if differing else None,
    )
    atomic.write_text(path, page)


# --- heat maps -------------------------------------------------------------------------------------------------------


def heat_map(caption: str, values: Sequence[tuple[str, float]], form: str) -> Heat:
    """Layer by kind of module; the largest size is the strongest colour."""
    placed = [(*_place(name), name, value) for name, value in values]
    kinds = list(dict.fromkeys(kind for _, kind, _, _ in placed))
    layers = sorted({layer for layer, _, _, _ in placed}, key=_in_order)
    top = max((abs(v) for _, v in values if math.isfinite(v)), default=0.0)
    cells = {
        (layer, kind): Cell(_share(v, top), format(v, form), f"{name}: {v:.4g}") for layer, kind, name, v in placed
    }
    return Heat(caption, kinds, [(layer, [cells.get((layer, kind)) for kind in kinds]) for layer in layers])


def _place(name: str) -> tuple[str, str]:
    """The layer's number, or a dash outside of layers; and what the module is called in it."""
    found = re.match(r"(?:.*?\.)?(\d+)\.(.*)", name)
    return (found.group(1), found.group(2)) if found else (NONE, name)


def _in_order(layer: str) -> int:
    return int(layer) if layer.isdigit() else -1


def _share(value: float, top: float) -> float:
    return min(1.0, abs(value) / top) if top > 0 and math.isfinite(value) else 0.0


def _of(modules: Sequence[ModuleComparison], value: Callable[[ModuleComparison], float]) -> list[tuple[str, float]]:
    return [(m.name, value(m)) for m in modules]


def _maps(found: AdapterReport) -> list[Heat]:
    modules = found.modules
    maps = [
        heat_map("Frobenius norm of the update", [(m.name, m.frobenius_norm) for m in modules], ".2g"),
        heat_map("Directions that keep 99 % of the energy", [(m.name, m.energy_rank_99) for m in modules], ".0f"),
        heat_map("Effective rank", [(m.name, m.effective_rank) for m in modules], ".1f"),
    ]
    beside = [(m.name, m.beside_base) for m in modules if m.beside_base]
    if beside:
        maps.append(heat_map("Size beside the base's weight", [(n, b.relative_norm) for n, b in beside], ".1%"))
        maps.append(heat_map("Amplification of its own directions", [(n, b.amplification) for n, b in beside], ".1f"))
        if counted := [(n, float(b.intruders)) for n, b in beside if b.intruders is not None]:
            maps.append(heat_map("Intruder dimensions", counted, ".0f"))
    return [m for m in maps if m.rows]


def _grid(phi: Sequence[Sequence[float]], chance: float) -> Heat | None:
    if not phi or not phi[0]:
        return None
    rows = [
        (str(i), [Cell(v, f"{v:.2f}", f"i = {i}, j = {j}: {v:.4f}") for j, v in enumerate(row, 1)])
        for i, row in enumerate(phi, 1)
    ]
    return Heat(f"by chance {chance:.3f}", [str(j) for j in range(1, len(phi[0]) + 1)], rows)


def _corner(phi: Sequence[Sequence[float]]) -> float:
    return phi[-1][-1] if phi and phi[-1] else 0.0


# --- spectra ---------------------------------------------------------------------------------------------------------


def _spectra(modules: Sequence[ModuleReport]) -> list[Figure]:
    """One chart for each kind of module: its layers' singular values beside their largest, on a logarithmic axis."""
    kinds: dict[str, list[ModuleReport]] = {}
    for module in modules:
        if module.spectral_norm > 0:
            kinds.setdefault(_place(module.name)[1], []).append(module)
    return [_spectrum(kind, found) for kind, found in kinds.items()]


def _spectrum(kind: str, modules: Sequence[ModuleReport]) -> Figure:
    lines = [
        [(i, math.log10(v / m.spectral_norm)) for i, v in enumerate(m.singular_values, 1) if v > 0] for m in modules
    ]
    drawn = [[p for p in line if p[1] >= FAINTEST] for line in lines]
    middle = sorted(drawn, key=lambda line: line[-1][1])[len(drawn) // 2]
    chart = Chart(
        label=f"Line chart of the singular values of {kind}, on a logarithmic axis.",
        lines=[Line(middle, "line"), *(Line(line, "line faint") for line in drawn if line is not middle)],
        tip=_tip,
        x_ticks=4,
        y_ticks=4,
    )
    largest = max(modules, key=lambda m: m.spectral_norm)
    said = f"{len(modules)} module{'s' if len(modules) > 1 else ''}; the largest value is {significant(largest.spectral_norm)}."
    return Figure(kind, said, draw(chart))


def _tip(point: tuple[Number, Number]) -> str:
    return f"value {point[0]:.0f}: {10 ** point[1]:.2g} of the largest"


# --- tables ----------------------------------------------------------------------------------------------------------


def _modules(found: AdapterReport) -> Table:
    head = [
        "Module",
        "r",
        "Scale",
        "Frobenius norm",
        "Spectral norm",
        "Stable rank",
        "Effective rank",
        "90 %",
        "95 %",
        "99 %",
    ]
    rows = [
        [
            m.name,
            *(str(m.r), f"{m.scale:g}", significant(m.frobenius_norm), significant(m.spectral_norm)),
            *(f"{m.stable_rank:.1f}", f"{m.effective_rank:.1f}"),
            *(str(m.energy_rank_90), str(m.energy_rank_95), str(m.energy_rank_99)),
        ]
        for m in found.modules
    ]
    if total := found.total:
        norms = (significant(total.frobenius_norm), significant(total.spectral_norm))
        ranks = (total.energy_rank_90, total.energy_rank_95, total.energy_rank_99)
        figures = (f"{total.stable_rank:.1f}", f"{total.effective_rank:.1f}")
        rows.append(["all together", str(total.r), NONE, *norms, *figures, *map(str, ranks)])
    return Table("Every module; the last columns are directions that keep so much of the energy", head, rows)
