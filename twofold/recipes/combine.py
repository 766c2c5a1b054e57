"""`twofold combine`: adapters of one base as one adapter, from files to files, module by module."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from twofold.adapter.files import AdapterFiles
from twofold.adapter.plain import PlainAdapter
from twofold.adapter.updates import Pair
from twofold.adapter.whole import ReadBase
from twofold.base.streamed import open_streamed
from twofold.config import check_seed
from twofold.errors import RunError
from twofold.events import Emit, Warned, silent
from twofold.lowrank.factors import LowRank
from twofold.merging.combine import Weighed, check, put_together, reduced_updates
from twofold.merging.methods import Combination
from twofold.merging.preview import PlaceSummary, summary, total_lost
from twofold.recipes.adapters import check_base, open_finite, recorded_head
from twofold.recipes.provenance import common_kept, common_provenance, compare_copies, digest


def combine(
    adapters: Mapping[str | Path, float],
    output: str | Path | None,
    *,
    method: str = Combination.method,
    r: int | None = Combination.r,
    density: float = Combination.density,
    base: str | None = None,
    seed: int = 0,
    allow_foreign_base: bool = False,
    emit: Emit = silent,
) -> dict[str, Any]:
    """Write one adapter whose update is what `method` makes of theirs; without an output, only say what it would be.

    Args:
        adapters: folders, each with its weight, which may be negative.
        output: the folder to write; None writes nothing.
        method: `cat` (exact, ranks add up), `svd` (the best of rank r), `linear` (exact or refused), `ties`, `dare_linear`,
            `dare_ties`, `magnitude_prune`.
        r: rank of what comes out, for the methods that bring it down; the largest of the adapters' if not given.
        density: share of the entries that ties, dare and pruning keep.
        base: that the adapters were trained on, which is checked, as are copies of its weights in them; needed only where they
            hold biases or whole modules and their weights do not add up to 1.
        allow_foreign_base: take adapters of other bases than this one, or than one another's.
        seed: of dare's draws.

    Returns:
        What came out and what was lost, in all and by module (`PlaceSummary`).

    Raises:
        ConfigError: what cannot be combined, all of it in one message.
        AdapterFileError: a folder is damaged or not understood, or holds NaN or infinity, or other weights than the base.
        ForeignBaseError: they were trained on different bases, or not on the one that is named.
        BaseError: that cannot be read, or lacks what is needed of it.
        RunError: the output exists or cannot be written.
    """
    if output is not None and Path(output).exists():
        raise RunError(f"{output} exists already; choose another output or remove it first")
    check_seed(seed)
    started = time.perf_counter()
    given = [Weighed(open_finite(Path(path)), weight) for path, weight in adapters.items()]
    how = Combination(method, r, density)
    files = [one.files for one in given]
    read = None if base is None else _reader(base, files, emit, allow_foreign=allow_foreign_base)
    check(given, how, read)
    compare_copies(files, read, emit)
    recorded_head([f.path for f in files])
    kept = common_kept(files, emit)
    provenance = common_provenance(files, _made(given, how, seed), emit, allow_foreign=allow_foreign_base)
    updates: dict[Pair, LowRank] = {}
    places = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for pair, parts, found in reduced_updates(given, how, emit):
            updates[pair] = found.update
            places.append(summary(pair.name, parts, found))
    if output is not None:
        tensors, config = put_together(given, updates, read)
        PlainAdapter(tensors, config, kept, provenance).write(Path(output))
    return _told(given, how, places, output, time.perf_counter() - started)


def _reader(base: str, files: Sequence[AdapterFiles], emit: Emit, *, allow_foreign: bool) -> ReadBase:
    """The values of the base, once it is known to be the adapters' own."""
    streamed = open_streamed(base, recorded_head([f.path for f in files]))
    taken = streamed.fingerprint()
    if taken is None:
        emit(Warned(text=f"{base} lies on disk in a form of which no fingerprint is taken; only shapes are compared"))
    else:
        for one in files:
            check_base(one, taken, emit, allow_foreign=allow_foreign)
    return streamed.read


def _made(given: Sequence[Weighed], how: Combination, seed: int) -> dict[str, Any]:
    sources = [{"adapter": o.files.path.name, "weight": o.weight, "sha256": digest(o.files)} for o in given]
    return {
        "combined": {"from": sources, "method": how.method, "r": how.r, "density": how.density, "seed": seed},
    }


def _told(
    given: Sequence[Weighed],
    how: Combination,
    places: Sequence[PlaceSummary],
    output: str | Path | None,
    seconds: float,
) -> dict[str, Any]:
    return {
        "output": None if output is None else str(output),
        "adapters": [{"path": str(one.files.path), "weight": one.weight} for one in given],
        "method": how.method,
        "r": max(place.r for place in places),
        "lost": total_lost(places),
        "modules": [place.as_json() for place in places],
        "seconds": seconds,
    }
