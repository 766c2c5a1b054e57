"""Ending early on purpose: SIGTERM lets a training end its step and write a checkpoint; a second one ends it at once.

Only where one process trains alone: several would have to agree on the step, and torchrun uses the same signal when one of them has
failed and the others wait for it in vain.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from twofold.errors import StoppedError


class Stopping:
    """Whether this process was asked to stop, and whether somebody looks for that between steps."""

    def __init__(self) -> None:
        self.asked = False
        self._looked_for = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """SIGTERM means `asked` in here; where nobody looks for that, it is an error at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            self.asked = False

    @contextmanager
    def looked_for(self) -> Iterator[None]:
        """Somebody looks at `asked` again and again in here."""
        self._looked_for = True
        try:
            yield
        finally:
            self._looked_for = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not self._looked_for:
            raise StoppedError("stopped; --resume goes on from the newest checkpoint, if there is one")
        self.asked = True


stopping = Stopping()
"""Of this process: a signal is for all of it."""
