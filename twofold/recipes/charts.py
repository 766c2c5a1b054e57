"""Charts as inline SVG, made by hand: pure functions from numbers to markup.

A chart must stay legible from a phone to a wide screen without a script. So everything is placed in per cent of the
plot, text and dots keep their own size, and only the curves live in a nested viewport that stretches (their strokes do
not). The axis labels hang outside the plot, in the padding that the page leaves around it. Colours are classes of the
page. Below the general part are the curves of a run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, TypeAlias, TypeGuard, TypeVar

from markupsafe import Markup

Number: TypeAlias = int | float
Point: TypeAlias = tuple[Number, Number]
Interval: TypeAlias = tuple[Number, Number]
Json: TypeAlias = Mapping[str, Any]
T = TypeVar("T")

POINTS, TIPS, MARKERS = 800, 160, 40
"""The most points of a curve, places on a chart that tell their figures, and dots; more dots make a line."""
VIEW = 1000
"""Side of the viewport that curves are drawn in."""


@dataclass(frozen=True)
class Figure:
    """A chart with its title and the sentence that it makes plain; `legend` is pairs of a line's class and its name."""

    title: str
    summary: str
    plot: Markup
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Line:
    """A curve; `css` is its class."""

    points: Sequence[Point]
    css: str


@dataclass(frozen=True)
class Marker:
    """A single measurement: `tip` is told on hovering, `note` is written beside it; `css` is its class."""

    point: Point
    tip: str
    note: str = ""
    css: str = "mark"


def downsample(points: Sequence[Point], limit: int = POINTS) -> list[Point]:
    """At most `limit` points: the first, the last, and the lowest and highest of each stretch between."""
    if len(points) <= limit:
        return list(points)
    stretches, inner = max(1, (limit - 2) // 2), points[1:-1]
    kept = [points[0]]
    for i in range(stretches):
        part = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]


def thin(points: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of them, evenly chosen, with the first and the last."""
    if len(points) <= limit:
        return list(points)
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


def smoothing_window(count: int) -> int:
    """How many steps a smoothed point averages: a twentieth of the run, at least 5, and odd."""
    return 2 * max(2, round(count / 40)) + 1


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """A centred mean, so that it does not lag; the window narrows towards the ends, so that steep ends stay steep."""
    sums, last = [0.0, *accumulate(y for _, y in points)], len(points) - 1
    means = []
    for i, (x, _) in enumerate(points):
        half = max(min(window // 2, i, last - i), window // 16)
        start, stop = max(0, i - half), min(last, i + half) + 1
        means.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return means


def round_step(span: Number, count: int) -> Number:
    """The smallest of 1, 2, 5 times a power of ten that divides `span` into at most `count` parts."""
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m in (1, 2, 5) if m * power >= raw * (1 - 1e-9)), 10 * power)


def ticks(interval: Interval, count: int) -> list[Number]:
    """Round numbers inside an interval, its ends included where they are round."""
    low, high = interval
    step = round_step(high - low, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def extent(values: Sequence[Number], count: int) -> Interval:
    """An interval between round numbers that holds all values, and zero where they come near it."""
    low, high = min(values), max(values)
    if 0 <= low < high / 2:
        low = 0.0
    if math.isclose(low, high, rel_tol=1e-6):
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    step = round_step(high - low, count)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def tick_text(value: Number, step: Number) -> str:
    """A tick's number, as short as its neighbours allow."""
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or step >= 1e3:
        return f"{value / 1e6:g}M" if step >= 1e5 else f"{value / 1e3:g}k"
    if step < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def significant(value: Number) -> str:
    """Four digits, and a power of ten for what would need many zeros."""
    if value == 0 or 1e-3 <= abs(value) < 1e6 or not math.isfinite(value):
        return f"{value:.4g}" if abs(value) < 1e3 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@dataclass(frozen=True)
class Chart:
    """What one plot shows.

    Attributes:
        label: what a screen reader is told.
        tip: the words shown over a point of the first line.
        x_text: what a tick below the plot says, from its value and the step between ticks.
        x_whole: whether ticks below the plot are whole numbers, as steps are.
    """

    label: str
    lines: Sequence[Line]
    tip: Callable[[Point], str]
    markers: Sequence[Marker] = field(default_factory=list)
    x_ticks: int = 6
    y_ticks: int = 5
    x_text: Callable[[Number, Number], str] = tick_text
    x_whole: bool = True


def draw(chart: Chart) -> Markup:
    """The plot: grid, curves, markers, and a strip over each point that tells its figures."""
    x_range, y_range = _ranges(chart)
    place = _placer(x_range, y_range)
    parts = [_grid(chart, x_range, y_range)]
    parts += [_curve(line, place) for line in chart.lines]
    parts.append(_tips(chart, place))
    parts += [_marker(m, place) for m in chart.markers]
    return Markup('<svg class="plot" role="img" aria-label="{}">{}</svg>').format(chart.label, Markup("").join(parts))


def _ranges(chart: Chart) -> tuple[Interval, Interval]:
    points = [p for line in chart.lines for p in line.points] + [m.point for m in chart.markers]
    xs = [x for x, _ in points]
    right = max(xs) if max(xs) > min(xs) else min(xs) + 1
    return (min(xs), right), extent([y for _, y in points], chart.y_ticks)


def _placer(x_range: Interval, y_range: Interval) -> Callable[[Point], Point]:
    """From values to per cent of the plot, from its upper left."""
    (x0, x1), (y0, y1) = x_range, y_range
    return lambda p: (100 * (p[0] - x0) / (x1 - x0), 100 * (y1 - p[1]) / (y1 - y0))


def _grid(chart: Chart, x_range: Interval, y_range: Interval) -> Markup:
    place = _placer(x_range, y_range)
    across = ticks(x_range, chart.x_ticks)
    if (step := round_step(x_range[1] - x_range[0], chart.x_ticks)) < 1 and chart.x_whole:
        across, step = [t for t in across if t == round(t)], 1.0
    up = ticks(y_range, chart.y_ticks)
    height = round_step(y_range[1] - y_range[0], chart.y_ticks)
    parts = [_y_tick(place((x_range[0], t))[1], tick_text(t, height)) for t in up]
    parts += [_x_tick(place((t, y_range[0]))[0], chart.x_text(t, step)) for t in across]
    return Markup("").join(parts)


def _y_tick(y: Number, text: str) -> Markup:
    return Markup(
        '<line class="grid" x1="0" x2="100%" y1="{0:.2f}%" y2="{0:.2f}%"/>'
        '<text class="tick y" x="-8" y="{0:.2f}%" dy="0.32em">{1}</text>'
    ).format(y, text)


def _x_tick(x: Number, text: str) -> Markup:
    return Markup(
        '<line class="notch" x1="{0:.2f}%" x2="{0:.2f}%" y1="100%" y2="100%"/>'
        '<text class="tick x" x="{0:.2f}%" y="100%" dy="1.6em">{1}</text>'
    ).format(x, text)


def _curve(line: Line, place: Callable[[Point], Point]) -> Markup:
    """Two equal points for a lone one: its round caps then make a dot."""
    points = downsample(line.points)
    scaled = [place(p) for p in (points * 2 if len(points) == 1 else points)]
    path = "L".join(f"{x * VIEW / 100:.1f} {y * VIEW / 100:.1f}" for x, y in scaled)
    return Markup(
        '<svg viewBox="0 0 {0} {0}" preserveAspectRatio="none" width="100%" height="100%" overflow="visible">'
        '<path class="{1}" d="M{2}"/></svg>'
    ).format(VIEW, line.css, path)


def _tips(chart: Chart, place: Callable[[Point], Point]) -> Markup:
    points = thin(chart.lines[0].points, TIPS) if chart.lines else []
    xs = [place(p)[0] for p in points]
    middles = [0.0, *((a + b) / 2 for a, b in pairwise(xs)), 100.0]
    strips = [_tip(place(p), middles[i : i + 2], chart.tip(p)) for i, p in enumerate(points)]
    return Markup("").join(strips)


def _tip(at: Point, strip: Sequence[Number], text: str) -> Markup:
    x, y = at
    return Markup(
        '<g class="tip"><title>{0}</title><rect x="{1:.2f}%" y="0" width="{2:.2f}%" height="100%"/>'
        '<line x1="{3:.2f}%" x2="{3:.2f}%" y1="0" y2="100%"/><circle cx="{3:.2f}%" cy="{4:.2f}%" r="4"/></g>'
    ).format(text, strip[0], strip[1] - strip[0], x, y)


def _marker(marker: Marker, place: Callable[[Point], Point]) -> Markup:
    x, y = place(marker.point)
    drawn = Markup('<circle class="{}" cx="{:.2f}%" cy="{:.2f}%" r="5"><title>{}</title></circle>').format(
        marker.css, x, y, marker.tip
    )
    if not marker.note:
        return drawn
    side, shift = ("end", "-2") if x > 50 else ("start", "12")
    lift = "1.6em" if y < 6 else "-1.3em"
    note = Markup('<text class="note" x="{:.2f}%" y="{:.2f}%" dx="{}" dy="{}" text-anchor="{}">{}</text>')
    return drawn + note.format(x, y, shift, lift if x > 50 else "0.32em", side, marker.note)


def bar(value: Number, top: Number, limit: Number | None = None) -> Markup:
    """A horizontal bar of `value` out of `top`, with a line at `limit`; for the eye only, its number is text."""
    parts = [Markup('<rect class="filled" width="{:.2f}%" height="100%" rx="2"/>').format(_share(value, top))]
    if limit is not None:
        parts.append(_limit(limit, top))
    return Markup('<svg class="bar" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


def gauge(measured: Number, expected: Number, band: Interval | None = None) -> Markup:
    """A measured bar over what was predicted: the expected value as a line, its range as a band. For the eye only."""
    top = 1.05 * max(measured, expected, *(band or ()))
    filled = Markup('<rect class="filled" y="30%" width="{:.2f}%" height="40%" rx="2"/>')
    parts = [filled.format(_share(measured, top))]
    if band:
        low, high = (_share(b, top) for b in band)
        parts.append(Markup('<rect class="band" x="{:.2f}%" width="{:.2f}%" height="100%"/>').format(low, high - low))
    parts.append(_limit(expected, top))
    return Markup('<svg class="gauge" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


def _limit(value: Number, top: Number) -> Markup:
    x = _share(value, top)
    return Markup('<line class="limit" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>').format(x)


def _share(value: Number, top: Number) -> Number:
    """Per cent of `top`, within the bar."""
    return min(100.0, max(0.0, 100 * value / top)) if top > 0 else 0.0


# --- a run's curves --------------------------------------------------------------------------------------------------


def loss_figure(report: Json, events: Sequence[Json], steps: Sequence[Json]) -> Figure | None:
    """Training loss as measured and smoothed, with every held-out loss marked."""
    points = _points(steps, "loss")
    if not points:
        return None
    window = smoothing_window(len(points))
    smooth = smoothed(points, window)
    means = dict(smooth)
    ends, along = held_out(report, events)
    lines = [Line(points, "line faint"), Line(smooth, "line")]
    if len(along) > MARKERS:
        lines.append(Line([m.point for m in along], "line held"))
    chart = Chart(
        label=f"Line chart of training loss by step. {_summary(points)}",
        lines=lines,
        tip=lambda p: f"step {p[0]:,.0f}: loss {p[1]:.3f}, smoothed {means[p[0]]:.3f}",
        markers=ends if len(along) > MARKERS else [*along, *ends],
        x_ticks=8,
    )
    legend = [("faint", "training loss"), ("", f"mean of {window:,} steps")]
    if ends or along:
        legend.append(("mark", "held-out loss"))
    return Figure("Loss", _summary(points), draw(chart), legend)


def held_out(report: Json, events: Sequence[Json]) -> tuple[list[Marker], list[Marker]]:
    """Every held-out loss: of the base before the first step and the adapter that was kept, and those along the way."""
    step = report.get("best_step") or report.get("steps")
    evaluation = report.get("evaluation") or {}
    name = "full" if evaluation.get("full") else "adapter"
    base, after = _loss_of(evaluation.get("base")), _loss_of(trained(report))
    ends = [] if base is None else [_end(0, base, "base, before training", "base")]
    if step is not None and after is not None:
        what = "the whole model" if name == "full" else "the adapter"
        ends.append(_end(step, after, f"{what}, step {step:,}", name))
    measured = [e for e in events if e.get("event") == "evaluated" and _finite(e.get("loss"))]
    return ends, [_on_the_way(e) for e in measured if e["step"] not in {m.point[0] for m in ends}]


def trained(report: Json) -> Json | None:
    """A run's held-out figures after training: of the adapter, or of the whole model."""
    evaluation = report.get("evaluation") or {}
    found: Json | None = evaluation.get("full") or evaluation.get("adapter")
    return found


def _loss_of(figures: Json | None) -> Number | None:
    loss = (figures or {}).get("loss")
    return float(loss) if _finite(loss) else None


def _end(step: int, loss: Number, what: str, name: str) -> Marker:
    return Marker((step, loss), f"{what}: held-out loss {loss:.3f}", f"{name} {loss:.3f}")


def _on_the_way(event: Json) -> Marker:
    return Marker((event["step"], event["loss"]), f"step {event['step']:,}: held-out loss {event['loss']:.3f}")


def small_figures(steps: Sequence[Json]) -> list[Figure]:
    """The three curves that explain the loss's."""
    keys = ("learning_rate", "gradient_norm", "tokens_per_second")
    found = [(key.replace("_", " ").capitalize(), _points(steps, key)) for key in keys]
    return [_small_figure(title, points) for title, points in found if points]


def _small_figure(title: str, points: Sequence[Point]) -> Figure:
    """Of a long run the curve is faint, under its mean."""
    lines = [Line(points, "line")]
    if len(points) > TIPS:
        lines = [Line(points, "line faint"), Line(smoothed(points, smoothing_window(len(points))), "line")]
    chart = Chart(
        label=f"Line chart of {title.lower()} by step. {_summary(points)}",
        lines=lines,
        tip=lambda p: f"step {p[0]:,.0f}: {title.lower()} {significant(p[1])}",
        x_ticks=4,
        y_ticks=4,
    )
    return Figure(title, _summary(points), draw(chart))


def _points(steps: Sequence[Json], key: str) -> list[Point]:
    return [(s["step"], s[key]) for s in steps if _finite(s.get(key))]


def _finite(value: Any) -> TypeGuard[Number]:
    return isinstance(value, int | float) and math.isfinite(value)


def _summary(points: Sequence[Point]) -> str:
    low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
    middle = significant(statistics.median(y for _, y in points))
    return (
        f"From {significant(points[0][1])} to {significant(points[-1][1])}; median {middle}, "
        f"lowest {significant(low[1])} at step {low[0]:,.0f}, highest {significant(high[1])} at step {high[0]:,.0f}."
    )
