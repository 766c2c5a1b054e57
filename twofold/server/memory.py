"""Generations of adapters in memory: leased to requests, and within a budget.

Those without leases go when no name stands for them any more, or, least recently used first, when the budget is needed, or when one
that is being read cannot be on the model beside them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from twofold.base.chat import Renderer
from twofold.errors import ClashError
from twofold.server.worker import Worker

log = logging.getLogger("twofold.server")


@dataclass(eq=False)
class Generation:
    """An adapter as it is in memory, of which it takes `bytes`. `leases` counts the requests that use it.

    Attributes:
        key: the name of its folder and the hash of its content.
        asked: names by which requests have called it.
    """

    key: str
    bytes: int
    renderer: Renderer
    asked: set[str] = field(default_factory=set)
    leases: int = 0
    stale: bool = False

    @property
    def name(self) -> str:
        return self.key.rpartition("@")[0]

    @property
    def digest(self) -> str:
        return self.key.rpartition("@")[2]

    def called(self, name: str) -> str:
        """What those who know it by this name call this very content."""
        return f"{name.partition('@')[0]}@{self.digest}"


class Memory:
    """What is in memory; it all runs on the event loop.

    Attributes:
        loaded: the generations by key, least recently used first.
        evictions: those dropped for others.
        dropped: is told each one that goes.
    """

    def __init__(self, budget_bytes: int, worker: Worker) -> None:
        self.budget_bytes, self.worker = budget_bytes, worker
        self.loaded: OrderedDict[str, Generation] = OrderedDict()
        self.evictions = 0
        self.dropped: Callable[[Generation], None] = lambda _: None
        self._room = asyncio.Condition()
        self._reserved = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def used_bytes(self) -> int:
        """Of the adapters in memory, and the files of those on their way."""
        return self._reserved + sum(g.bytes for g in self.loaded.values())

    @property
    def settled(self) -> bool:
        """Whether nothing is on its way in or out."""
        return not self._reserved and not self._tasks

    def lease(self, generation: Generation) -> Generation:
        """One more lease on a generation, which was used last now."""
        self.loaded.move_to_end(generation.key)
        generation.leases += 1
        return generation

    def release(self, generation: Generation) -> None:
        """Give a lease back."""
        generation.leases -= 1
        if not generation.leases:
            self._later(self.tidy(generation))

    @asynccontextmanager
    async def reserved(self, size: int, check: Callable[[], None]) -> AsyncIterator[None]:
        """Room for so much, once there is some, idle generations dropped for it; `check` raises where it is wanted no longer."""
        async with self._room:
            check()
            while not await self._evict(size):
                await self._room.wait()
                check()
            self._reserved += size
        try:
            yield
        finally:
            self._reserved -= size
            async with self._room:
                await self._evict()
                self._room.notify_all()

    async def read(self, key: str, folder: Path) -> int:
        """Have the engine read an adapter, idle generations dropped where some are in its way; the bytes that it takes.

        Raises:
            ClashError: one that is in use is in its way.
        """
        try:
            return await self.worker.load(key, folder)
        except ClashError:
            async with self._room:
                while await self._drop_idle():
                    pass
            return await self.worker.load(key, folder)

    async def tidy(self, generation: Generation) -> None:
        """Drop a generation that is stale and idle, and what is above the budget."""
        async with self._room:
            if generation.stale and not generation.leases and generation.key in self.loaded:
                await self._drop(generation)
            await self._evict()
            self._room.notify_all()

    async def _evict(self, size: int = 0) -> bool:
        """Drop idle generations until the budget has room for so much more; whether it has."""
        while self.used_bytes + size > self.budget_bytes:
            if not await self._drop_idle():
                return False
        return True

    async def _drop_idle(self) -> bool:
        """Drop the idle generation that was used least recently, if there is one."""
        idle = next((g for g in self.loaded.values() if not g.leases), None)
        if idle is not None:
            self.evictions += 1
            await self._drop(idle)
        return idle is not None

    async def _drop(self, generation: Generation) -> None:
        """Free a generation that nobody uses."""
        del self.loaded[generation.key]
        self.dropped(generation)
        await self.worker.call(lambda scheduler: scheduler.drop_adapter(generation.key))
        log.info("adapter dropped", extra={"fields": {"adapter": generation.key}})

    def _later(self, work: Coroutine[None, None, None]) -> None:
        """Do something soon, and hold on to it until it is done."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self.worker.healthy:
            log.error("an adapter could not be dropped", exc_info=task.exception())
