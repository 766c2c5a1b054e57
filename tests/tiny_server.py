"""A served tiny Llama with adapters that give themselves away, over HTTP on loopback and in process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI

from twofold.adapter.attach import attach, detach, shares
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import Provenance, save_adapter
from twofold.base.load import Base, load_base
from twofold.engine.scheduler import Scheduler
from twofold.events import silent
from twofold.recipes.serve import ServeConfig, Served
from twofold.server.app import make_app
from twofold.server.run import Server

CONTEXT = 256
FAST = 0.05
"""Seconds between two looks at the folder."""


def write_adapter(base: Base, folder: Path, seed: int, r: int = 4, **provenance: Any) -> Path:
    """A random adapter, loud enough for its answers to differ from any other's."""
    attach(base.model, LoraConfig(r=r, lora_alpha=2 * r), "probe")
    generator = torch.Generator().manual_seed(seed)
    for share in shares(base.model, "probe").values():
        for parameter in share.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    known = Provenance(base=base.fingerprint.as_json(), **provenance)
    save_adapter(base.model, folder, "probe", provenance=known, base_name="tiny")
    detach(base.model, "probe")
    return folder


def served(base_folder: Path, streams: int = 4) -> Served:
    """A tiny base called `tiny`, as the recipe would load it."""
    base = load_base(str(base_folder), "float32", "cpu")
    return Served(base, Scheduler(base.model, streams=streams, capacity=CONTEXT), ("tiny",), CONTEXT)


def bytes_in_memory(of: Served, folder: Path) -> int:
    """What an adapter takes once it is read."""
    of.scheduler.put_adapter("measured", folder)
    found = of.scheduler.adapter_bytes("measured")
    of.scheduler.drop_adapter("measured")
    return found


@dataclass
class Running:
    """A server on a free port of loopback."""

    url: str
    app: FastAPI
    server: Server

    @property
    def service(self) -> Any:
        return self.app.state.service

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **more)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **more)

    def say(self, model: str, text: str = "colour of the cup 1?", tokens: int = 8, **more: Any) -> str:
        """The greedy answer of a model."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
        found = self.post("/v1/chat/completions", {**body, "ignore_eos": True, **more})
        assert found.status_code == 200, found.text
        return str(found.json()["choices"][0]["message"]["content"])


@contextlib.contextmanager
def running(of: Served, config: ServeConfig) -> Iterator[Running]:
    """The server in a thread of its own."""
    app = make_app(of, config)
    server = Server(app, replace(config, port=0), silent)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", app, server)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextlib.asynccontextmanager
async def in_process(of: Served, config: ServeConfig) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    """The application without a socket; its client, and its service."""
    app = make_app(of, config)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client, app.state.service


def lines(text: str) -> list[Any]:
    """The events of a stream; the last is `[DONE]` as text."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [f if f == "[DONE]" else json.loads(f) for f in found]


async def eventually(holds: Any, seconds: float = 10.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


def question(model: str, text: str = "hat?", **more: Any) -> dict[str, Any]:
    """A greedy question of eight tokens."""
    messages: Sequence[Any] = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}


async def say(client: Any, model: str, **more: Any) -> str:
    """What a model answers."""
    found = await client.post("/v1/chat/completions", json=question(model, **more))
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["message"]["content"])
