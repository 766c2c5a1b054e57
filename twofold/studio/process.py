"""Processes that outlive whoever started them, noted on disk: found again after a restart, and never mistaken for another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from twofold import atomic


@dataclass(frozen=True, kw_only=True)
class Noted:
    """A process as it was noted when it began.

    Attributes:
        pid: its number, which another process may have by now.
        created: when it began, in the system's own words, which tells them apart.
        started: seconds since 1970.
        stopping: whether it was told to stop.
    """

    pid: int
    created: float
    started: float
    stopping: bool = False

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        try:
            found = psutil.Process(self.pid)
            same = abs(float(found.create_time()) - self.created) < 0.05
            return same and found.status() != str(psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False

    def tell(self, what: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.alive:
            os.kill(self.pid, what)

    def write(self, file: Path) -> None:
        """Note it."""
        atomic.write_json(file, asdict(self))


def noted(file: Path) -> Noted | None:
    """The process that a file tells of, if there is one."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return Noted(**found)
    except (OSError, ValueError, TypeError):
        return None


def start(arguments: Sequence[str], log: Path, note: Path) -> subprocess.Popen[bytes]:
    """Begin a process in a session of its own, so that it outlives this one; what it says goes to `log`."""
    with log.open("wb") as said:
        process = subprocess.Popen(
            list(arguments), stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
    created = psutil.Process(process.pid).create_time()
    Noted(pid=process.pid, created=created, started=time.time()).write(note)
    return process
