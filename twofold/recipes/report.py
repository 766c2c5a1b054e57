"""report.html: the run's report as one page that opens from disk without a network."""

from __future__ import annotations
from pathlib import Path
from typing import Any
from twofold import atomic


def write_page(path: Path, report: dict[str, Any], preflight: dict[str, Any], events: list[dict[str, Any]]) -> None:
    atomic.write_text(path, "todo")
