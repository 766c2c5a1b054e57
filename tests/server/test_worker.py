"""The engine's thread: what happens to requests that are taken back while it is busy, and at its end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tiny_server import eventually, served

from twofold.engine.request import Request
from twofold.engine.scheduler import Ended, Made
from twofold.errors import ConfigError
from twofold.server.errors import ApiError
from twofold.server.worker import Admitted, EngineThread, Event, Worker

pytest_plugins = ("tiny_fixtures",)
ASKED = Request(token_ids=[5, 6, 7], max_new_tokens=200)


@contextlib.asynccontextmanager
async def worker_over(base: Path) -> AsyncIterator[Worker]:
    worker = Worker(served(base).scheduler, EngineThread())
    worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


def test_tokens_come_in_their_order_and_the_end_comes_once(llama_base: Path) -> None:
    async def scene() -> None:
        async with worker_over(llama_base) as worker:
            heard: list[Event] = []
            await worker.submit([Request(token_ids=[5, 6, 7], max_new_tokens=6)], [heard.append])
            await eventually(lambda: heard and isinstance(heard[-1], Ended))
            admitted, *made, ended = heard
            assert isinstance(admitted, Admitted)
            assert len(made) == 6
            assert all(isinstance(m, Made) and ended == Ended(m.stream, "length") for m in made)

    asyncio.run(scene())


def test_a_request_that_is_taken_back_before_it_was_begun_never_runs(llama_base: Path) -> None:
    async def scene() -> None:
        async with worker_over(llama_base) as worker:
            busy, heard = threading.Event(), list[Made | Ended]()
            holding = asyncio.create_task(worker.call(lambda _: busy.wait(10)))
            await asyncio.sleep(0.02)
            asking = asyncio.create_task(worker.submit([ASKED], [heard.append]))
            await asyncio.sleep(0.02)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            busy.set()
            await holding
            await eventually(lambda: heard)
            assert [e.reason for e in heard if isinstance(e, Ended)] == ["cancelled"]
            assert len(heard) == 1
            assert await worker.call(lambda scheduler: scheduler.idle)

    asyncio.run(scene())


def test_where_one_request_can_never_run_none_does(llama_base: Path) -> None:
    wrong = (Request(token_ids=[5], max_new_tokens=10_000), Request(token_ids=[5], adapters={"nobody": 1.0}))

    async def scene() -> None:
        async with worker_over(llama_base) as worker:
            for never in wrong:
                heard: list[list[Made | Ended]] = [[], [], []]
                with pytest.raises(ConfigError):
                    await worker.submit([ASKED, never, ASKED], [one.append for one in heard])
                await eventually(lambda h=heard: all(one and isinstance(one[-1], Ended) for one in h))
                assert all(one[-1].reason == "cancelled" for one in heard if isinstance(one[-1], Ended))
            assert await worker.call(lambda scheduler: scheduler.idle)

    asyncio.run(scene())


def test_stopping_ends_what_runs_and_what_waits(llama_base: Path) -> None:
    async def scene() -> None:
        async with worker_over(llama_base) as worker:
            heard: list[list[Made | Ended]] = [[] for _ in range(8)]
            await worker.submit([ASKED] * 8, [one.append for one in heard])
            await worker.stop()
            await eventually(lambda: all(one and isinstance(one[-1], Ended) for one in heard))
            assert {one[-1].reason for one in heard if isinstance(one[-1], Ended)} == {"cancelled"}
            with pytest.raises(ApiError):
                await worker.call(lambda scheduler: scheduler.idle)
            assert not worker.healthy

    asyncio.run(scene())
