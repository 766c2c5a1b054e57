"""Tables with a row for each module: what the names have in common stands once, above them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

from rich.table import Table


class ModuleTable:
    """The columns of a verb behind that of the names."""

    def __init__(self, names: Sequence[str], columns: Iterable[str]) -> None:
        self._start = common_start(names)
        self.drawn = Table(box=None, header_style="bold")
        self.drawn.add_column(f"{self._start}…" if self._start else "module", no_wrap=True)
        for column in columns:
            self.drawn.add_column(column)

    def add(self, name: str, *cells: str) -> None:
        """The row of one module."""
        self.drawn.add_row(name.removeprefix(self._start), *cells)


def common_start(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot; nothing of one name alone."""
    if len(names) < 2:
        return ""
    parts = zip(*(name.split(".") for name in names), strict=False)
    return "".join(f"{same[0]}." for same in takewhile(lambda some: len(set(some)) == 1, parts))
