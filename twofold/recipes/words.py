"""Figures as a person reads them, and tables of them: what the pages and the terminal say alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from twofold.recipes.charts import Number

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Rows whose first cell is their heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]


def dig(value: Any, *keys: str) -> Any:
    """A value inside nested mappings; None as soon as something is absent."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def shown(value: Any, form: str | Callable[[Number], str]) -> str:
    """A number in a format, or a dash where there is none."""
    if value is None:
        return NONE
    return form(value) if callable(form) else format(value, form)


def memory(count: Number) -> str:
    """Bytes in GB, or MB below a tenth of one; never broken over two lines."""
    return f"{count / 1e9:.2f}\u00a0GB" if count >= 1e8 else f"{count / 1e6:.1f}\u00a0MB"


def duration(seconds: Number) -> str:
    """Seconds as a person says them."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}\u00a0h {minutes % 60}\u00a0min"
    if minutes:
        return f"{minutes}\u00a0min {rest}\u00a0s"
    return f"{seconds:.2g}\u00a0s" if seconds < 10 else f"{rest}\u00a0s"


def magnitude(count: Number) -> str:
    """A count, in millions or billions where it is that large."""
    for size, name in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g}\u00a0{name}"
    return f"{count:,}"
