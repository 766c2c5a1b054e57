"""Python's collector while libraries and models are loaded."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

RARELY = 100_000
"""New objects between two looks for garbage; Python's own are 700."""


@contextlib.contextmanager
def collected_rarely() -> Iterator[None]:
    """For what makes hundreds of thousands of objects that stay: looking through them again and again is a tenth of a start."""
    usual = gc.get_threshold()
    if not 0 < usual[0] < RARELY:  # somebody else's, who restores it; or none at all
        yield
        return
    gc.set_threshold(RARELY, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
