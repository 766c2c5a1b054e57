"""`twofold inspect` and `twofold compare`: adapters, module by module, from their factors."""

from __future__ import annotations

from pathlib import Path

from twofold.adapter.files import open_adapter
from twofold.inspection.compare import Comparison, compare_adapters
from twofold.inspection.report import AdapterReport, report_adapter


def inspect_adapter(path: Path | str) -> AdapterReport:
    """Norms, ranks and findings of an adapter folder.

    Raises:
        AdapterFileError: the folder is damaged or not understood.
    """
    return report_adapter(open_adapter(Path(path)))


def compare(first: Path | str, second: Path | str) -> Comparison:
    """How alike the updates of two adapter folders are.

    Raises:
        AdapterFileError: a folder is damaged or not understood.
        ConfigError: they have no module in common, or of other shapes.
    """
    return compare_adapters(open_adapter(Path(first)), open_adapter(Path(second)))
