"""Adapters that are read while streams run: a few milliseconds of it between two passes, so that no stream waits for a whole one.

Another thread would not do: it takes the interpreter and the cores from the passes, and the longest grows by what reading takes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from twofold.engine.resident import Resident
from twofold.events import Pieces

BETWEEN_PASSES = 0.006
"""Seconds of reading after which the streams have their turn; the last piece may take as long again."""
Done = Callable[[Resident | None, Exception | None], None]


class _Load(NamedTuple):
    work: Pieces[Resident]
    done: Done


class Loads:
    """Adapters on their way, one after the other."""

    def __init__(self) -> None:
        self._left: deque[_Load] = deque()

    def __len__(self) -> int:
        return len(self._left)

    def add(self, work: Pieces[Resident], done: Done) -> None:
        """Read one more; `done` is told the outcome once."""
        self._left.append(_Load(work, done))

    def go_on(self, seconds: float | None = None) -> None:
        """Read on for about so long, one piece at least."""
        until = time.perf_counter() + (BETWEEN_PASSES if seconds is None else seconds)
        while self._left:
            self._read(self._left[0])
            if time.perf_counter() >= until:
                return

    def _read(self, load: _Load) -> None:
        try:
            next(load.work)
        except StopIteration as ended:
            self._left.popleft()
            load.done(ended.value, None)
        except Exception as error:
            self._left.popleft()
            load.done(None, error)
