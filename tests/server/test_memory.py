"""What is in memory of adapters: as many as the budget holds, each read once, and none that nobody waits for."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_server import (
    FAST,
    bytes_in_memory,
    eventually,
    in_process,
    question,
    say,
    served,
    write_adapter,
)

from twofold.adapter.attach import attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.recipes.serve import ServeConfig
from twofold.server import layout

pytest_plugins = ("tiny_fixtures", "server_fixtures")


def test_more_adapters_than_memory_are_loaded_on_demand(llama_base: Path, adapters: Path, tmp_path: Path) -> None:
    base = served(llama_base)
    for i in range(12):
        write_adapter(base.base, tmp_path / f"a{i}", 100 + i)
    size = bytes_in_memory(base, tmp_path / "a0")
    config = ServeConfig(adapters=tmp_path, adapter_memory_mb=3.5 * size / 1e6)

    async def scene() -> None:
        async with in_process(base, config) as (client, service):
            alone = [await say(client, f"a{i}") for i in range(12)]
            assert len(set(alone)) == 12
            assert service.registry.memory.evictions == 9
            again = await asyncio.gather(*(say(client, f"a{i % 12}") for i in range(24)))
            assert again == alone * 2
            await eventually(lambda: service.registry.memory.used_bytes <= 3.5 * size)
            assert len(service.registry.loaded) <= 3
            assert all(g.leases == 0 for g in service.registry.loaded)

    asyncio.run(scene())


def test_the_least_recently_used_goes_first(llama_base: Path, adapters: Path) -> None:
    base = served(llama_base)
    size = max(bytes_in_memory(base, adapters / n) for n in ("red", "green", "blue"))

    async def scene() -> None:
        config = ServeConfig(adapters=adapters, adapter_memory_mb=2.5 * size / 1e6)
        async with in_process(base, config) as (client, service):
            for name in ("red", "green", "red", "blue"):
                await say(client, name)
            assert [g.name for g in service.registry.loaded] == ["red", "blue"]

    asyncio.run(scene())


def test_adapters_that_change_a_module_in_different_ways_take_turns_in_a_models_own_forward(
    gpt2_base: Path, tmp_path: Path
) -> None:
    base, model = served(gpt2_base), served(gpt2_base).base.model
    ways = {"plain": {}, "biased": {"bias": "all"}, "whole": {"modules_to_save": ["c_attn"]}}
    for i, (name, more) in enumerate(ways.items()):
        attach(model, LoraConfig(r=4, target_modules=["c_fc"] if more else ["c_attn"], **more))
        generator = torch.Generator().manual_seed(i)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        save_adapter(model, tmp_path / name)
        detach(model)

    async def scene() -> None:
        async with in_process(base, ServeConfig(adapters=tmp_path)) as (client, service):

            async def ask(name: str, tokens: int = 8) -> Any:
                asked = {"model": name, "prompt": "hat?", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
                return await client.post("/v1/completions", json=asked)

            said = [(await ask(name)).json()["choices"][0]["text"] for name in (*ways, *ways)]
            assert said[:3] == said[3:]
            assert len(set(said)) == 3
            going = asyncio.create_task(ask("whole", 100))
            await eventually(lambda: service.worker.scheduler.running > 0)
            found = await ask("plain")
            assert (found.status_code, found.headers["retry-after"]) == (503, "1")
            assert found.json()["error"]["message"].startswith("adapter 'plain' cannot be beside one that is in use")
            await going
            assert (await ask("plain")).json()["choices"][0]["text"] == said[0]

    asyncio.run(scene())


def test_what_counts_is_what_an_adapter_takes_and_not_its_files(wide_base: Path, tmp_path: Path) -> None:
    base = served(wide_base)
    for i in range(3):
        write_adapter(base.base, tmp_path / f"a{i}", 100 + i, r=16)
    held, file = bytes_in_memory(base, tmp_path / "a0"), sum(f.stat().st_size for f in (tmp_path / "a0").iterdir())
    assert held > 1.5 * file

    async def scene(room: float) -> list[Any]:
        config = ServeConfig(adapters=tmp_path, adapter_memory_mb=room / 1e6)
        async with in_process(served(wide_base), config) as (client, service):
            found = [await client.post("/v1/chat/completions", json=question(f"a{i}")) for i in range(3)]
            await eventually(lambda: not any(g.leases for g in service.registry.loaded))
            listed = (await client.get("/v1/lora_adapters")).json()["data"]
            assert [a["bytes"] for a in listed if a["generation"]] == [held] * len(service.registry.loaded)
            assert service.registry.memory.used_bytes == held * len(service.registry.loaded)
            assert set(service.worker.scheduler._pool.residents) == {g.key for g in service.registry.loaded}
            return [len(service.registry.loaded), service.registry.memory.evictions, *(f.status_code for f in found)]

    assert asyncio.run(scene(3 * held)) == [3, 0, 200, 200, 200]
    assert asyncio.run(scene(held + file)) == [1, 2, 200, 200, 200]
    assert asyncio.run(scene(held - 1)) == [0, 0, 400, 400, 400]


def test_what_is_above_the_budget_while_all_is_in_use_goes_when_it_is_not(wide_base: Path, tmp_path: Path) -> None:
    base = served(wide_base)
    for i in range(2):
        write_adapter(base.base, tmp_path / f"a{i}", 100 + i, r=16)
    held, file = bytes_in_memory(base, tmp_path / "a0"), sum(f.stat().st_size for f in (tmp_path / "a0").iterdir())

    async def scene() -> None:
        config = ServeConfig(adapters=tmp_path, adapter_memory_mb=(held + file) / 1e6)
        async with in_process(base, config) as (_, service):
            registry = service.registry
            leased = [await registry.acquire(f"a{i}") for i in range(2)]
            assert registry.memory.used_bytes == 2 * held
            for generation in leased:
                registry.release(generation)
            await eventually(lambda: [g.name for g in registry.loaded] == ["a1"])
            assert registry.memory.evictions == 1

    asyncio.run(scene())


def test_one_load_serves_all_who_wait_for_it(llama_base: Path, adapters: Path) -> None:
    async def scene() -> None:
        async with in_process(served(llama_base), ServeConfig(adapters=adapters)) as (client, service):
            said = await asyncio.gather(*(say(client, "red") for _ in range(6)))
            assert len(set(said)) == 1
            assert service.registry.loads == 1

    asyncio.run(scene())


def test_what_nobody_waits_for_any_more_is_not_loaded(wide_base: Path, tmp_path: Path) -> None:
    """While there is no room for it, and while its files are copied; then the next who asks gets it."""
    base = served(wide_base)
    for i in range(2):
        write_adapter(base.base, tmp_path / f"a{i}", 100 + i, r=16)
    held, file = bytes_in_memory(base, tmp_path / "a0"), sum(f.stat().st_size for f in (tmp_path / "a0").iterdir())

    async def scene(monkeypatch: pytest.MonkeyPatch) -> None:
        config = ServeConfig(adapters=tmp_path, adapter_memory_mb=max(held, file) / 1e6)
        async with in_process(base, config) as (_, service):
            registry, pieces, copying, go_on = service.registry, layout._pieces, threading.Event(), threading.Event()

            def held_up(*given: Any) -> Any:
                copying.set()
                assert go_on.wait(10)
                return pieces(*given)

            async def leave(name: str, when: Callable[[], bool]) -> None:
                asking = asyncio.create_task(registry.acquire(name))
                await eventually(when)
                asking.cancel()
                await asyncio.wait([asking])

            first = await registry.acquire("a0")
            await leave("a1", lambda: "a1" in registry.awaited())
            registry.release(first)
            await eventually(lambda: not registry.awaited())
            assert [g.name for g in registry.loaded] == ["a0"]
            monkeypatch.setattr(layout, "_pieces", held_up)
            await leave("a1", copying.is_set)
            go_on.set()
            await eventually(lambda: not registry.awaited())
            assert registry.loads == 1
            assert (await registry.acquire("a1")).name == "a1"
            assert registry.loads == 2

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(scene(monkeypatch))


def test_a_disk_that_fails_once_is_no_reason_to_refuse_an_adapter(
    llama_base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(adapters))

    async def scene() -> None:
        async with in_process(served(llama_base), ServeConfig(adapters=adapters)) as (client, service):
            for owner, name in ((layout, "_pieces"), (tempfile, "mkdtemp")):
                with monkeypatch.context() as broken:
                    broken.setattr(owner, name, full)
                    found = await client.post("/v1/chat/completions", json=question("red"))
                assert (found.status_code, found.json()["error"]["code"]) == (503, "adapter_unreadable")
                assert "No space left on device" in found.text
                assert str(adapters) not in found.text
                assert service.registry.refusal_of("red") is None
            assert await say(client, "red")

    asyncio.run(scene())


def test_files_that_are_written_again_while_they_are_read_are_read_once(
    llama_base: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        async with in_process(served(llama_base), ServeConfig(adapters=root, poll_seconds=FAST)) as (client, service):
            load, reached, go_on = service.worker.load, asyncio.Event(), asyncio.Event()

            async def held(key: str, folder: Path) -> int:
                reached.set()
                await go_on.wait()
                return int(await load(key, folder))

            monkeypatch.setattr(service.worker, "load", held)
            first = asyncio.create_task(say(client, "red"))
            await reached.wait()
            for file in (root / "red").iterdir():
                os.utime(file)
            await service.registry.refresh()
            second = asyncio.create_task(say(client, "red"))
            await eventually(lambda: len(service.registry._keys) == 2)  # both have copied and hashed the files
            go_on.set()
            assert await first == await second == await say(client, "red")
            assert service.registry.loads == 1

    asyncio.run(scene())
