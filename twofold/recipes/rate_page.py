"""The page of a search for the learning rate: loss against rate, on a logarithmic axis, and the figures behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twofold import atomic
from twofold.recipes.charts import Chart, Figure, Line, Marker, Number, Point, draw
from twofold.recipes.pages import template
from twofold.recipes.words import NONE, Table, shown

WORTH_DRAWING = 1.5
"""Losses above this many times the untouched model's would press all others flat."""


def write_page(path: Path, found: Mapping[str, Any]) -> None:
    """Write what `find_lr` found as one file.

    Raises:
        RunError: the file cannot be written.
    """
    atomic.write_text(path, render(found))


def render(found: Mapping[str, Any]) -> str:
    """The page as HTML."""
    rate = found["suggested_learning_rate"]
    return template("find_lr.html.j2", {}).render(
        base=found["base"],
        r=found["r"],
        headline=f"Learning rate {rate:g}" if rate else "No rate to suggest",
        reason=found["reason"],
        losses=_figure(found),
        rates=_table(found),
    )


def _figure(found: Mapping[str, Any]) -> Figure | None:
    trials, untouched = found["trials"], found["untouched_loss"]
    points = _points(trials, "loss", WORTH_DRAWING * untouched)
    if not points:
        return None
    held_out = _points(trials, "held_out_loss", WORTH_DRAWING * untouched)
    chart = Chart(
        label="Line chart of the loss after a few steps by learning rate, on a logarithmic axis.",
        lines=[Line(points, "line"), *([Line(held_out, "line held")] if held_out else [])],
        tip=lambda p: f"rate {10 ** p[0]:.2g}: loss {p[1]:.3f}",
        markers=_marker(found["suggested_learning_rate"], points),
        x_text=_power,
    )
    missing = len(trials) - len(points)
    said = f"Mean loss of each run's last quarter; the untouched model's is {untouched:.3f}."
    said += f" Of {len(trials)} rates {missing} ended too high to draw." if missing else ""
    legend = [("", "training loss"), *([("held", "held-out loss")] if held_out else [])]
    return Figure("Loss by learning rate", said, draw(chart), legend)


def _points(trials: Sequence[Mapping[str, Any]], key: str, highest: float) -> list[Point]:
    """Losses over the rate's logarithm to base ten."""
    drawn = [t for t in trials if t["loss"] is not None and t[key] is not None and t[key] <= highest]
    return [(math.log10(t["learning_rate"]), t[key]) for t in drawn]


def _marker(rate: float | None, points: Sequence[Point]) -> list[Marker]:
    at = [p for p in points if rate and p[0] == math.log10(rate)]
    return [Marker(p, f"suggested: {rate:g}, loss {p[1]:.3f}", f"{rate:g}") for p in at]


def _power(value: Number, step: Number) -> str:
    """The rate at a place of the axis, whose ticks are whole powers of ten."""
    return f"1e{value:.0f}"


def _table(found: Mapping[str, Any]) -> Table:
    rows = [
        [f"{t['learning_rate']:g}", shown(t["loss"], ".4f"), shown(t["held_out_loss"], ".4f"), verdict(t, found)]
        for t in found["trials"]
    ]
    return Table("Every rate", ["Learning rate", "Loss", "Held-out loss", ""], rows)


def verdict(trial: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What is to be said of one rate."""
    if trial["learning_rate"] == found["suggested_learning_rate"]:
        return "suggested"
    if trial["loss"] is None:
        return "not finite"
    return "diverged" if trial["diverged"] else NONE
