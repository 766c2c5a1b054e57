"""`twofold resize`: an adapter at smaller ranks, the best ones there are, and what that takes from it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from twofold.adapter.plain import PlainAdapter
from twofold.errors import RunError
from twofold.events import Emit, Warned, silent
from twofold.merging.combine import Weighed, put_together
from twofold.merging.preview import share_lost
from twofold.merging.resize import Resized, Size, resized_updates
from twofold.recipes.adapters import open_finite
from twofold.recipes.provenance import common_kept, common_provenance, compare_copies, digest


def resize(adapter: str | Path, output: str | Path, size: Size, emit: Emit = silent) -> dict[str, Any]:
    """Write the adapter with every update at the rank that `size` gives it, from its factors.

    Returns:
        Ranks and losses, in all and by module.

    Raises:
        ConfigError: its factors are no plain matrices.
        AdapterFileError: the folder is damaged or not understood, or holds NaN or infinity.
        RunError: the output exists or cannot be written.
    """
    if Path(output).exists():
        raise RunError(f"{output} exists already; choose another output or remove it first")
    started = time.perf_counter()
    files = open_finite(Path(adapter))
    if files.config.use_dora:
        emit(Warned(text="this is DoRA: the loss that is told is that of B·A alone, the lengths of the rows are kept"))
    compare_copies([files], None, emit)
    found = list(resized_updates(files, size, emit))
    tensors, config = put_together([Weighed(files, 1.0)], {pair: update for pair, update, _ in found}, None)
    made = {"resized": {"from": files.path.name, "sha256": digest(files), **_said(size)}}
    provenance = common_provenance([files], made, emit, allow_foreign=False)
    PlainAdapter(tensors, config, common_kept([files], emit), provenance).write(Path(output))
    return _told(Path(output), [one for _, _, one in found], time.perf_counter() - started)


def _said(size: Size) -> dict[str, Any]:
    return {name: value for name, value in vars(size).items() if value is not None}


def _told(output: Path, modules: list[Resized], seconds: float) -> dict[str, Any]:
    return {
        "output": str(output),
        "r": max(m.r for m in modules),
        "before": max(m.before for m in modules),
        "lost": share_lost([(m.norm, m.lost) for m in modules]),
        "modules": [m.as_json() for m in modules],
        "seconds": seconds,
    }
