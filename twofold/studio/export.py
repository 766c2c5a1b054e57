"""The lesson as one file that opens without a server or a network, about any adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from twofold import atomic
from twofold.adapter.files import open_adapter
from twofold.adapter.updates import updates_of
from twofold.errors import ConfigError
from twofold.studio.app import NOT_BUILT, PAGE
from twofold.studio.catalogue import described
from twofold.studio.pictures import module_picture
from twofold.studio.roots import SAMPLE, SAMPLE_FOLDER

PLACE = re.compile(r'(<script type="application/json" id="your-adapter">)\s*null\s*(</script>)')
"""In the built file, where the adapter goes."""
DIGITS = 5


def export_lesson(to: Path, adapter: Path | None) -> None:
    """Write the lesson about an adapter, or about the one that ships.

    Raises:
        ConfigError: the page was not built.
        AdapterFileError: the adapter is damaged or not understood.
        RunError: the file cannot be written.
    """
    try:
        page = (PAGE / "lesson.html").read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(NOT_BUILT) from error
    folder = adapter or next(p for p in sorted(SAMPLE_FOLDER.iterdir()) if p.is_dir())
    files = open_adapter(folder)
    modules = [rounded(module_picture(files, name)) for name in updates_of(files)]
    name = folder.name if adapter else f"{SAMPLE}/{folder.name}"
    told = json.dumps({"adapter": described(name, folder), "modules": modules}, separators=(",", ":"))
    safe = told.replace("</", "<\\/")
    atomic.write_text(to, PLACE.sub(lambda found: found[1] + safe + found[2], page))


def rounded(value: Any) -> Any:
    """The same with numbers to five digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value
