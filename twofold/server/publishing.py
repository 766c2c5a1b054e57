"""Adapters on their way into the folder that all engines share."""

from __future__ import annotations

import shutil
from pathlib import Path

from twofold import atomic
from twofold.adapter.files import CONFIG, OURS, TENSORS, open_adapter
from twofold.errors import AdapterFileError
from twofold.server.layout import CURRENT, NAME, content_hash


def publish(adapter: Path | str, root: Path | str, name: str) -> str:
    """Put an adapter folder into a root as a new generation and make it the current one; its name, `NAME@HASH`.

    Raises:
        UserError: it is no adapter, the name cannot be used, or the root cannot be written.
    """
    if not NAME.fullmatch(name):
        raise AdapterFileError(f"'{name}' cannot name an adapter; use letters, digits, '.', '_' and '-'")
    adapter, root = Path(adapter), Path(root)
    open_adapter(adapter)
    generation = f"{name}@{content_hash(adapter)}"
    if not (root / generation).exists():
        with atomic.new_folder(root / generation) as folder:
            for file in (CONFIG, TENSORS, OURS):
                if (adapter / file).exists():
                    shutil.copyfile(adapter / file, folder / file)
    atomic.write_text(root / f"{name}{CURRENT}", generation + "\n")
    return generation
