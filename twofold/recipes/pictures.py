"""Pictures that need no page around them: a chart with its axes, its legend and its colours as one SVG file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from twofold.recipes.charts import Chart, Line, Marker, Number, Point, draw, significant, tick_text

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#1b1b1b")
STYLE = (
    "path{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}.grid{stroke:#ddd}.tip *{opacity:0}"
    ".tick{fill:#555;font-size:12px}.tick.y{text-anchor:end}.tick.x{text-anchor:middle}.plot{overflow:visible}"
    ".notch{stroke:#ddd}path.error{stroke-width:1}circle{r:3.5px}"
)
PAGE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 440" font-family="sans-serif" font-size="14"><style>{}</style>'
    '<rect width="860" height="440" fill="#fff"/><text x="60" y="22" fill="#222">{}</text>'
    '<svg x="60" y="44" width="600" height="340" overflow="visible">{}</svg>'
    '<text x="360" y="430" text-anchor="middle" fill="#555">{}</text>{}</svg>\n'
)


@dataclass(frozen=True)
class Series:
    """A curve with its name; `errors` is half the length of the bar at each point, where it is known."""

    name: str
    points: Sequence[Point]
    errors: Sequence[Number | None] = ()


def picture(
    title: str, x_title: str, series: Sequence[Series], x_text: Callable[[Number, Number], str] = tick_text
) -> str:
    """The curves as one SVG.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not any(s.points for s in series):
        raise ValueError("there is nothing to draw")
    lines = [Line(s.points, f"v{i % len(COLOURS)}") for i, s in enumerate(series) if s.points]
    bars = [bar for i, s in enumerate(series) for bar in _bars(s, i)]
    dots = [Marker(p, f"{s.name}: {significant(p[1])}", css=_dot(i)) for i, s in enumerate(series) for p in s.points]
    label = f"{title}: {', '.join(s.name for s in series)}"
    plot = draw(
        Chart(label, [*lines, *bars], lambda p: significant(p[1]), dots, x_text=x_text, x_whole=x_text is power_of_ten)
    )
    colours = "".join(f".v{i}{{stroke:{c}}}.{_dot(i)}{{fill:{c}}}" for i, c in enumerate(COLOURS))
    return str(Markup(PAGE).format(Markup(STYLE + colours), title, plot, x_title, _legend(series)))


def _dot(place: int) -> str:
    return f"d{place % len(COLOURS)}"


def _bars(series: Series, place: int) -> list[Line]:
    pairs = zip(series.points, series.errors, strict=False)
    return [Line([(x, y - e), (x, y + e)], f"v{place % len(COLOURS)} error") for (x, y), e in pairs if e]


def _legend(series: Sequence[Series]) -> Markup:
    row = Markup('<text x="680" y="{}" fill="{}">{}</text>')
    return Markup("").join(row.format(60 + 22 * i, COLOURS[i % len(COLOURS)], s.name) for i, s in enumerate(series))


def power_of_ten(value: Number, step: Number) -> str:
    """What stands below an axis of logarithms."""
    return f"{10**value:.1g}"
