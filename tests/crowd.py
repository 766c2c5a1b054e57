"""Clients of a server, each with a probe adapter of its own, that ask, stream, err and leave while their adapters change."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from probes import TENSORS, Probes, said
from tiny_server import Running, lines, question

from twofold.server.layout import content_hash
from twofold.server.publishing import publish

CONTENTS = 3
ROUTE = "/v1/chat/completions"
SOON = 0.1
"""Seconds within which a client leaves."""
BUSY = 429
FEW = 5
WRONG: tuple[tuple[dict[str, Any], set[int]], ...] = (
    ({"model": "nobody"}, {404}),
    ({"messages": []}, {400}),
    ({"messages": [{"role": "robot", "content": "hat?"}]}, {400}),
    ({"temperatur": 1}, {400}),
    ({"temperature": -1}, {400}),
    ({"n": 1000}, {400}),
    ({"max_tokens": 100_000}, {400, 404, BUSY}),
    ({"logit_bias": {"100000": 5}}, {400, 404, BUSY}),
    ({"guided_regex": "("}, {400, 404, BUSY}),
)
"""What is changed in a question, and how it may be refused; one may first find its adapter unloaded, or the queue full."""


@dataclass
class Told:
    """What came of a load: faults in words, events by kind, and the answers as (client, content, text)."""

    faults: list[str] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    answers: set[tuple[int, int, str]] = field(default_factory=set)

    def seen(self, kind: str) -> int:
        return self.counted[kind]


class Crowd:
    """All clients over one folder of adapters.

    A client's adapter changes in one of three ways: its file is replaced, its alias moves to another generation, or it is loaded in
    place over HTTP, which takes effect when it is answered; `asked` is how often that was begun, `done` how often it has ended.
    Its content is `asked % CONTENTS` from then on.
    """

    live: Running

    def __init__(self, probes: Probes, root: Path, clients: int) -> None:
        self.probes, self.root, self.clients = probes, root, clients
        self.asked, self.done = [0] * clients, [0] * clients
        self.dice = random.Random(3)
        self.hashes: dict[str, tuple[int, int]] = {}
        self.back = [0.0] * clients  # when an adapter that was unloaded could be asked for again
        self.changing: set[int] = set()
        for i in range(clients):
            for c in range(CONTENTS):
                folder = probes.write(root / "store" / f"{i}.{c}", i, c)
                self.hashes[content_hash(folder)] = (i, c)
            if i % 3 == 1:
                publish(self._stored(i, 0), root, _name(i))
            else:
                shutil.copytree(self._stored(i, 0), root / _name(i))

    def _stored(self, client: int, content: int) -> Path:
        return self.root / "store" / f"{client}.{content}"

    # ------------------------------------------------------------------------------------------ the load

    async def come(self, seconds: float) -> Told:
        """All clients at once for so long, and those who change their adapters."""
        told, until = Told(), time.monotonic() + seconds

        async def again(what: Callable[[httpx.AsyncClient, Told], Awaitable[None]]) -> None:
            async with self._client() as client:
                while time.monotonic() < until:
                    await what(client, told)

        acts = (partial(self._act, i) for i in range(self.clients))
        await asyncio.gather(*(again(act) for act in acts), again(self._replace), again(self._unload))
        return told

    def _client(self) -> httpx.AsyncClient:
        """One for each of them: a pool that all share is searched from end to end with every request."""
        return httpx.AsyncClient(base_url=self.live.url, timeout=30, verify=False)

    async def ask_once_more(self, told: Told) -> None:
        """One question a client, when nobody changes anything any more and the folder was looked at again.

        At last a few ask, have their adapter replaced, and ask again, while slots still hold what the old one has computed.
        """
        service = self.live.service
        few = asyncio.Semaphore(
            service.admission.limit // 2
        )  # each may ask for two answers, and nobody is to be sent away
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(service.registry.refresh(), service.worker._loop))
        self.done = list(self.asked)

        async def one(client: httpx.AsyncClient, i: int) -> None:
            async with few:
                await self._whole(client, i, told)

        async with self._client() as client:
            await asyncio.gather(*(one(client, i) for i in range(self.clients)))
            for i in range(2, self.clients, 3)[-FEW:]:
                await one(client, i)
                self.asked[i] += 1
                await self._load(client, i, told)
                await one(client, i)

    async def _act(self, i: int, client: httpx.AsyncClient, told: Told) -> None:
        kinds = (self._whole, self._streamed, self._leave, self._leave_stream, self._half, self._wrong, self._bare)
        (act,) = self.dice.choices(kinds, weights=(30, 30, 10, 10, 3, 12, 5))
        try:
            await act(client, i, told)
        except (httpx.TransportError, ValueError, KeyError) as error:
            told.faults.append(f"client {i}, {act.__name__}: {error!r}")

    # ------------------------------------------------------------------------------------------ what clients do

    def _question(self, i: int, **more: Any) -> dict[str, Any]:
        return question(_name(i), _text(i), max_tokens=self.dice.choice((1, 4, 12, 24)), **more)

    async def _whole(self, client: httpx.AsyncClient, i: int, told: Told) -> None:
        body, newest, begun = self._question(i, n=self.dice.choice((1, 1, 1, 2))), self.done[i], time.monotonic()
        found = await client.post(ROUTE, json=body)
        if found.status_code != 200:
            return await self._refused(found, i, begun, told)
        answer = found.json()
        if [c["finish_reason"] for c in answer["choices"]] != ["length"] * body["n"]:
            told.faults.append(f"client {i}: no whole answer: {found.text}")
        for choice in answer["choices"]:
            self._judge(i, newest, answer["system_fingerprint"], choice["message"]["content"], body, told)
        told.counted["whole"] += 1

    async def _streamed(self, client: httpx.AsyncClient, i: int, told: Told) -> None:
        body, newest, begun = self._question(i, stream=True), self.done[i], time.monotonic()
        found = await client.post(ROUTE, json=body)
        if found.status_code != 200:
            return await self._refused(found, i, begun, told)
        *events, end = lines(found.text)
        if end != "[DONE]" or events[-1]["choices"][0]["finish_reason"] != "length":
            told.faults.append(f"client {i}: a stream that is not whole: {found.text}")
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        self._judge(i, newest, events[0]["system_fingerprint"], text, body, told)
        told.counted["streamed"] += 1

    async def _leave(self, client: httpx.AsyncClient, i: int, told: Told) -> None:
        body = self._question(i) | {"max_tokens": 200}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.dice.uniform(0, SOON)):
                await client.post(ROUTE, json=body)
        await self._come_again("left", told)

    async def _leave_stream(self, client: httpx.AsyncClient, i: int, told: Told) -> None:
        body = self._question(i, stream=True) | {"max_tokens": 200}
        left = self.dice.randrange(12)
        async with client.stream("POST", ROUTE, json=body) as found:
            async for _ in found.aiter_lines():
                left -= 1
                if left < 0:
                    break
        await self._come_again("left", told)

    async def _half(self, _: httpx.AsyncClient, i: int, told: Told) -> None:
        """A request whose body never comes to its end."""
        at = httpx.URL(self.live.url)
        body = json.dumps(self._question(i)).encode()
        _, writer = await asyncio.open_connection(at.host, at.port)
        head = f"POST {ROUTE} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body[: self.dice.randrange(len(body))])
        await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        await self._come_again("left", told)

    async def _wrong(self, client: httpx.AsyncClient, i: int, told: Told) -> None:
        change, expected = self.dice.choice(WRONG)
        found = await client.post(ROUTE, json=self._question(i) | change)
        if found.status_code not in expected or not found.json()["error"]["message"]:
            told.faults.append(f"client {i}: {change} got {found.status_code}: {found.text}")
        told.counted["refused"] += 1

    async def _bare(self, client: httpx.AsyncClient, i: int, told: Told) -> None:
        begun = time.monotonic()
        found = await client.post(ROUTE, json=self._question(i) | {"model": "tiny"})
        if found.status_code == 200 and said(found.json()["choices"][0]["message"]["content"]):
            told.faults.append(f"the base speaks as an adapter: {found.text}")
        elif found.status_code != 200:
            await self._refused(found, i, begun, told)

    async def _come_again(self, why: str, told: Told) -> None:
        """Wait a little, as people do who have left or were sent away."""
        told.counted[why] += 1
        await asyncio.sleep(self.dice.uniform(SOON, 10 * SOON))

    # ------------------------------------------------------------------------------------------ what is heard

    async def _refused(self, found: httpx.Response, i: int, begun: float, told: Told) -> None:
        """A full queue, after which the client waits; or an adapter that was unloaded meanwhile."""
        code = found.json()["error"]["code"]
        if (found.status_code, code) == (BUSY, "queue_full") and int(found.headers["retry-after"]) >= 1:
            await self._come_again("busy", told)
        elif (found.status_code, code) == (404, "model_not_found") and begun <= self.back[i]:
            told.counted["away"] += 1
        else:
            told.faults.append(f"client {i}: {found.status_code}: {found.text}")

    def _judge(self, i: int, newest: int, generation: str, text: str, body: dict[str, Any], told: Told) -> None:
        """An answer must be the client's own, of the content that it says, and that not one replaced earlier."""
        name, _, digest = generation.partition("@")
        owner, content = self.hashes[digest]
        fresh = {k % CONTENTS for k in range(newest, self.asked[i] + 1)}
        if (name, owner) != (_name(i), i) or said(text) != [(i, content)] * body["max_tokens"]:
            told.faults.append(f"client {i} heard another: {generation}, which is {owner}.{content}, said {text}")
        elif content not in fresh:
            told.faults.append(f"client {i} heard content {content}, which was replaced before")
        told.answers.add((i, content, text))

    def unlikely(self, told: Told) -> list[tuple[int, int, str]]:
        """The answers that are not what the probes say by themselves; of those that begin alike the longest is judged."""
        ordered = sorted(told.answers)
        longest = [a for a, b in zip(ordered, [*ordered[1:], None], strict=True) if b is None or not _begins(a, b)]
        return [(i, c, text) for i, c, text in longest if not self.probes.would_say(i, c, _text(i), text)]

    # ------------------------------------------------------------------------------------------ what changes

    async def _replace(self, client: httpx.AsyncClient, told: Told) -> None:
        """Somebody's adapter gets its next content."""
        i = self.dice.randrange(self.clients)
        if i not in self.changing:
            self.changing.add(i)
            self.asked[i] += 1
            stored = self._stored(i, self.asked[i] % CONTENTS)
            if i % 3 == 0:
                coming = self.root / ".coming"
                shutil.copyfile(stored / TENSORS, coming)
                os.rename(coming, self.root / _name(i) / TENSORS)
            elif i % 3 == 1:
                publish(stored, self.root, _name(i))
            else:
                await self._load(client, i, told)
            self.changing.discard(i)
            told.counted["replaced"] += 1
        await asyncio.sleep(0.02)

    async def _load(self, client: httpx.AsyncClient, i: int, told: Told) -> None:
        where, number = f"store/{i}.{self.asked[i] % CONTENTS}", self.asked[i]
        body = {"lora_name": _name(i), "lora_path": where, "load_inplace": True}
        found = await client.post("/v1/load_lora_adapter", json=body)
        if found.status_code == 200:
            self.done[i] = number
        else:
            told.faults.append(f"adapter {i} was not loaded: {found.status_code}: {found.text}")

    async def _unload(self, client: httpx.AsyncClient, told: Told) -> None:
        """Somebody's adapter is away for a while."""
        i = self.dice.choice([k for k in range(2, self.clients, 3) if k not in self.changing])
        self.changing.add(i)
        self.back[i] = math.inf
        found = await client.post("/v1/unload_lora_adapter", json={"lora_name": _name(i)})
        if found.status_code != 200:
            told.faults.append(f"adapter {i} was not unloaded: {found.status_code}: {found.text}")
        await asyncio.sleep(SOON)
        await self._load(client, i, told)
        self.back[i] = time.monotonic()
        self.changing.discard(i)
        told.counted["unloaded"] += 1


def _begins(a: tuple[int, int, str], b: tuple[int, int, str]) -> bool:
    return a[:2] == b[:2] and b[2].startswith(a[2])


def _name(client: int) -> str:
    return f"probe-{client}"


def _text(client: int) -> str:
    return f"colour of the hat {client}?"
