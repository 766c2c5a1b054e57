"""Two hundred clients over HTTP, some wrong, some leaving, while their adapters are replaced, unloaded and pushed out of memory.

Each client has a probe adapter (`tests/probes.py`), whose answer names it and its content, token by token. A short form of the
load belongs to the default run, the long one is slow.
"""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from crowd import CONTENTS, Crowd, Told
from probes import Probes, write_probed_base
from tiny_server import bytes_in_memory, eventually, running, served

from twofold.engine.resident import Resident
from twofold.recipes.serve import ServeConfig

STREAMS, QUEUED = 16, 20
"""Fewer than there are clients: some are told to come again."""
IN_MEMORY = 38
"""Adapters: as many as can be in use at a time, and two more."""
GROWTH = 40e6
"""Bytes by which the process may grow over the last two thirds of the long load: allocators keep some."""


@contextmanager
def crowded(work: Path, monkeypatch: pytest.MonkeyPatch, clients: int) -> Iterator[Crowd]:
    """So many clients of a server that has room for some of their adapters."""
    (work / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work / "temporary"))
    probes = Probes(write_probed_base(work / "base", clients, CONTENTS), work)
    found = Crowd(probes, work / "root", clients)
    base = served(probes.base, streams=STREAMS)
    config = ServeConfig(
        adapters=found.root,
        poll_seconds=0.1,
        max_queued=QUEUED,
        adapter_memory_mb=IN_MEMORY * bytes_in_memory(base, found.root / "store" / "0.0") / 1e6,
    )
    threads, files = names_of_threads(), open_files()
    with running(base, config) as live:
        found.live = live
        yield found
    assert names_of_threads() <= threads | {"engine"}
    assert open_files() <= files


def names_of_threads() -> set[str]:
    return {t.name for t in threading.enumerate()}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def own_bytes() -> int:
    gc.collect()
    known = psutil.Process().memory_info()
    return int(known.rss - known.shared)


def nothing_is_left(crowd: Crowd) -> None:
    """By the engine's own books, when everybody has gone: no stream, slot, token, place, lease or adapter that nobody has."""
    service = crowd.live.service
    scheduler, registry = service.worker.scheduler, service.registry
    slots = scheduler._forward.slots
    assert (scheduler.running, scheduler.waiting, len(service.worker._streams)) == (0, 0, 0)
    assert (slots.free, scheduler.cache_used) == (STREAMS, 0)
    assert service.admission.inside == 0
    assert all(g.leases == 0 and not g.stale for g in registry.loaded)
    assert registry.memory.settled
    assert not registry.awaited()
    keys = {g.key for g in registry.loaded}
    assert set(scheduler._pool.residents) == keys
    gc.collect()
    alive = [o.key for o in gc.get_objects() if type(o) is Resident and o.key.rpartition("@")[2] in crowd.hashes]
    assert sorted(alive) == sorted(keys), "adapters that were dropped are still in memory"
    assert registry.memory.used_bytes <= service.config.adapter_memory_mb * 1e6
    assert [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("twofold-")] == []


def check(crowd: Crowd, told: Told) -> None:
    """Every response was whole or a clear error, and nobody heard another's adapter."""
    assert told.faults == []
    assert crowd.unlikely(told) == []


async def rest(crowd: Crowd) -> None:
    """Until the server has let go of everybody who left."""
    service = crowd.live.service
    scheduler, registry = service.worker.scheduler, service.registry
    await eventually(
        lambda: (
            scheduler.idle
            and not service.admission.inside
            and not registry.awaited()
            and registry.memory.settled
            and not any(g.leases for g in registry.loaded)
        ),
        30,
    )


def loaded(crowd: Crowd, seconds: float) -> Told:
    """So many seconds of load, and then one more question of each client, which the newest adapter must answer."""

    async def scene() -> Told:
        told = await crowd.come(seconds)
        await rest(crowd)
        await crowd.ask_once_more(told)
        await rest(crowd)
        return told

    told = asyncio.run(scene())
    check(crowd, told)
    nothing_is_left(crowd)
    return told


def test_everybody_is_answered_by_their_own_adapter_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with crowded(tmp_path, monkeypatch, clients=60) as crowd:
        told = loaded(crowd, 4)
    kinds = ("whole", "streamed", "left", "refused", "busy", "replaced", "unloaded")
    assert [kind for kind in kinds if not told.seen(kind)] == []


@pytest.mark.slow
def test_a_minute_of_two_hundred_leaves_no_more_than_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with crowded(tmp_path, monkeypatch, clients=200) as crowd:
        loaded(crowd, 20)
        threads, files, memory = threading.active_count(), open_files(), own_bytes()
        told = loaded(crowd, 40)
        assert told.seen("whole") > crowd.clients
        assert threading.active_count() <= threads
        assert open_files() <= files
        assert own_bytes() < memory + GROWTH
