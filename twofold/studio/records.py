"""A run's events as they lie on disk: read on from a cursor, or from the end.

A cursor is `OFFSET-CHECK`: how far the file was read, and a check of the line that ends there. Lines carry the time at which they
were written, so the same line at the same place means that nothing before it has changed; a resumed run forgets the events after
its checkpoint, and then the check fails and the reader begins anew. A damaged line is passed over.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofold.recipes.runs import event_of

START = "0-0"
FIRST_LOOK = 1 << 16
"""Bytes of the end of a file that are looked at first; twice as many each time nothing is found in them."""


@dataclass(frozen=True)
class Read:
    """Events from a cursor on, each with the cursor behind it; `anew` when the cursor was of another file."""

    events: list[tuple[str, dict[str, Any]]]
    cursor: str
    anew: bool = False


def read_from(file: Path, cursor: str) -> Read:
    """The events behind a cursor; from the start where it does not fit the file. A line that is not whole yet is left for later."""
    try:
        with file.open("rb") as lines:
            offset = _fitting(lines, cursor)
            anew = offset is None
            lines.seek(offset or 0)
            data = lines.read()
    except FileNotFoundError:
        return Read([], START, anew=cursor != START)
    events, at, last = [], offset or 0, START if anew else cursor
    for line in data.split(b"\n")[:-1]:
        at += len(line) + 1
        last = _cursor(at, line + b"\n")
        if (event := event_of(line)) is not None:
            events.append((last, event))
    return Read(events, last, anew)


def last_records(file: Path, kinds: Sequence[str], within: int | None = 200) -> list[dict[str, Any]]:
    """The events of these kinds among the last so many of a file, or among as few of the last as hold one."""
    try:
        size = file.stat().st_size
        look = FIRST_LOOK
        while True:
            with file.open("rb") as lines:
                lines.seek(max(0, size - look))
                whole = lines.read().split(b"\n")[0 if look >= size else 1 : -1]
            found = map(event_of, whole[-within if within else 0 :])
            chosen = [record for record in found if record is not None and record.get("event") in kinds]
            if chosen or look >= size or (within and len(whole) >= within):
                return chosen
            look *= 2
    except OSError:
        return []


def _fitting(lines: Any, cursor: str) -> int | None:
    """The place that a cursor means, if the file is the one that it was made for."""
    offset, _, check = cursor.partition("-")
    if cursor == START:
        return 0
    if not (offset.isdecimal() and len(offset) < 16 and check.isdecimal()):
        return None
    at, look = int(offset), FIRST_LOOK
    if at > lines.seek(0, os.SEEK_END):
        return None
    while True:
        begin = max(0, at - look)
        lines.seek(begin)
        data = lines.read(at - begin)
        start = data.rfind(b"\n", 0, -1)
        if start >= 0 or begin == 0:
            line = data[start + 1 :]
            return at if line.endswith(b"\n") and _cursor(at, line) == cursor else None
        look *= 2


def _cursor(at: int, line: bytes) -> str:
    return f"{at}-{zlib.crc32(line)}"
