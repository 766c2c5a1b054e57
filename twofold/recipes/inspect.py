"""`twofold inspect`: an adapter, module by module, from its factors."""

from __future__ import annotations

from pathlib import Path

from twofold.adapter.files import open_adapter
from twofold.inspection.report import AdapterReport, report_adapter


def inspect_adapter(path: Path | str) -> AdapterReport:
    """Norms, ranks and findings of an adapter folder.

    Raises:
        AdapterFileError: the folder is damaged or not understood.
    """
    return report_adapter(open_adapter(Path(path)))
