"""Chat with a base and its adapters side by side: the engine in a child process, adapters put beside each other on one base.

The child is `twofold serve` on a free port of loopback with a key that only this process knows. An adapter is published into a
folder of the child's under the hash of its files: the same bytes are the same model, changed ones another, and no base is loaded
again for it. A child that dies is reported and started once more.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import httpx

from twofold.base.load import Precision
from twofold.errors import UserError
from twofold.server.errors import ApiError
from twofold.server.layout import content_hash
from twofold.server.publishing import publish
from twofold.studio.roots import Roots

State: TypeAlias = Literal["closed", "loading", "ready", "failed"]
BASE = "base"
"""What the child calls its base."""
ADAPTER = "adapter"
"""What every adapter is called; their hashes tell them apart."""
LIKELIEST = 5
"""Tokens that are told beside each one that was chosen."""
ANSWER_SECONDS = 600.0
READY_SECONDS = 0.1
"""Between two questions whether the child is ready."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One answer among several: an adapter, or none for the bare base, and how loud it is."""

    adapter: str | None = None
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation to be gone on with, in every lane."""

    messages: tuple[Turn, ...]
    lanes: tuple[Lane, ...]
    max_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Child:
    """A process that serves a base."""

    process: asyncio.subprocess.Process
    folder: Path
    client: httpx.AsyncClient
    loaded: dict[str, str] = field(default_factory=dict)

    async def end(self) -> None:
        """Stop it and take away what was published for it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 5)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        await self.client.aclose()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)


class Play:
    """At most one base at a time."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.state: State = "closed"
        self.base: str | None = None
        self.dtype: Precision = "auto"
        self.message: str | None = None
        self._child: Child | None = None
        self._watching: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._publishing = asyncio.Lock()

    def told(self) -> dict[str, Any]:
        """How it stands."""
        loaded = list(self._child.loaded) if self._child else []
        return {"state": self.state, "base": self.base, "adapters": loaded, "message": self.message}

    async def open(self, base: str, dtype: Precision = "auto") -> None:
        """Begin to load a base, in place of the one before; nothing happens if it is that one.

        Raises:
            ApiError: no such base.
        """
        reference = self.roots.base(base)
        async with self._changing:
            if (self.base, self.dtype) == (base, dtype) and self.state in ("loading", "ready"):
                return
            await self._end()
            self.base, self.dtype = base, dtype
            await self._start(reference)

    async def close(self) -> None:
        """Free the base's memory."""
        async with self._changing:
            await self._end()
            self.base = None

    async def _end(self) -> None:
        self.state, self.message = "closed", None
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._child is not None:
            await self._child.end()
        self._child = self._watching = None

    # ------------------------------------------------------------------------------------------ the child

    async def _start(self, reference: str, lost: str | None = None) -> None:
        """Begin a child; `lost` says what became of the one before, if it was lost."""
        self.state, self.message = "loading", lost
        port, key = _free_port(), secrets.token_hex(16)
        folder = Path(tempfile.mkdtemp(prefix="twofold-play-"))
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "twofold.studio.engine", stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
        )
        told = {"base": reference, "dtype": self.dtype, "adapters": str(folder), "name": BASE, "port": port, "key": key}
        assert process.stdin is not None
        process.stdin.write(json.dumps(told).encode() + b"\n")
        client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"authorization": f"Bearer {key}"},
            timeout=ANSWER_SECONDS,
            trust_env=False,  # no proxy stands between two processes of one machine
        )
        self._child = Child(process, folder, client)
        self._watching = asyncio.create_task(self._watch(self._child, reference, lost))

    async def _watch(self, child: Child, reference: str, lost: str | None) -> None:
        """Follow a child from its first word to its end."""
        ready = asyncio.create_task(self._until_ready(child))
        refused = await self._heard(child, lost)
        code = await child.process.wait()
        ready.cancel()
        was_ready = self.state == "ready"
        why = f"it was ended by signal {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"
        self.state, self.message = "failed", refused or f"the engine's process is gone: {why}; open the base again"
        if was_ready and lost is None:
            await child.client.aclose()
            await asyncio.to_thread(shutil.rmtree, child.folder, ignore_errors=True)
            async with self._changing:
                await self._start(reference, f"the engine's process was gone ({why}) and is being started again")

    async def _heard(self, child: Child, lost: str | None) -> str | None:
        """Its words while it loads, until it says no more; why it refused, if it did."""
        refused: str | None = None
        assert child.process.stdout is not None
        async for line in child.process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue
            refused = said.get("error", refused)
            if self.state == "loading" and said.get("event") in ("message", "progress"):
                text = self.roots.worded(said.get("text") or said.get("task"))
                self.message = f"{lost}: {text}" if lost else text
        return refused and self.roots.worded(refused)

    async def _until_ready(self, child: Child) -> None:
        while True:
            try:
                if (await child.client.get("/ready")).status_code == 200:
                    self.state, self.message = "ready", None
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(READY_SECONDS)

    # ------------------------------------------------------------------------------------------ answers

    async def answers(self, chat: Chat) -> AsyncIterator[dict[str, Any]]:
        """Every lane's answer as it comes, all of them at once: tokens, then why it ended or what went wrong.

        Raises:
            ApiError: no base is ready.
        """
        child = self._ready()
        said: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def run(number: int, lane: Lane) -> None:
            try:
                async for event in self._answer(child, chat, lane):
                    said.put_nowait({"lane": number, **event})
            except ApiError as error:
                said.put_nowait({"lane": number, "error": {"message": self.roots.worded(str(error))}})
            except httpx.HTTPError:
                gone = "the engine's process is gone; it is being started again"
                said.put_nowait({"lane": number, "error": {"message": gone}})
            finally:
                said.put_nowait(None)

        running = [asyncio.create_task(run(i, lane)) for i, lane in enumerate(chat.lanes)]
        try:
            left = len(running)
            while left:
                event = await said.get()
                if event is None:
                    left -= 1
                else:
                    yield event
        finally:
            for task in running:
                task.cancel()

    def _ready(self) -> Child:
        if self.state != "ready" or self._child is None:
            raise ApiError(503, self.message or "no base is open; open one first")
        return self._child

    async def _answer(self, child: Child, chat: Chat, lane: Lane) -> AsyncIterator[dict[str, Any]]:
        model = BASE if lane.adapter is None else await self._model(child, lane.adapter)
        asked = {
            "model": model,
            "messages": [{"role": t.role, "content": t.content} for t in chat.messages],
            "max_tokens": chat.max_tokens,
            "temperature": chat.temperature,
            "seed": chat.seed,
            "adapter_scale": lane.scale,
            "stream": True,
            "logprobs": True,
            "top_logprobs": LIKELIEST,
        }
        async with child.client.stream("POST", "/v1/chat/completions", json=asked) as answer:
            if answer.status_code != 200:
                raise ApiError(answer.status_code, _reason(await answer.aread()))
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    for event in tokens_of(json.loads(line.removeprefix("data: "))):
                        yield event

    async def _model(self, child: Child, adapter: str) -> str:
        """What the child calls an adapter, which it has after this; a folder that has changed is another adapter."""
        folder = self.roots.folder(adapter)
        async with self._publishing:
            try:
                name = f"{ADAPTER}-{await asyncio.to_thread(content_hash, folder)}"
                if name not in child.loaded.values():
                    placed = await asyncio.to_thread(publish, folder, child.folder, name)
                    body = {"lora_name": name, "lora_path": placed}
                    answer = await child.client.post("/v1/load_lora_adapter", json=body)
                    if answer.status_code != 200:
                        raise ApiError(answer.status_code, _reason(answer.content).replace(name, adapter))
            except (UserError, OSError) as error:
                raise ApiError(400, str(error)) from error
            child.loaded[adapter] = name
        return name


def tokens_of(chunk: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """The tokens of a piece of an answer, each with its text and its likelihood, and why it ended, if it did.

    Raises:
        ApiError: the piece tells of an error.
    """
    if "error" in chunk:
        raise ApiError(500, str(chunk["error"]["message"]))
    found: list[dict[str, Any]] = []
    for choice in chunk["choices"]:
        text = choice["delta"].get("content") or ""
        tokens = (choice.get("logprobs") or {}).get("content") or []
        own = "".join(t["token"] for t in tokens) == text
        for i, token in enumerate(tokens):
            shown = token["token"] if own else text if i == len(tokens) - 1 else ""
            likely = [{"token": t["token"], "logprob": t["logprob"]} for t in token["top_logprobs"]]
            found.append({"text": shown, "token": token["token"], "logprob": token["logprob"], "top": likely})
        if text and not tokens:
            found.append({"text": text, "token": text, "logprob": None, "top": []})
        if choice["finish_reason"]:
            found.append({"finish_reason": choice["finish_reason"]})
    return found


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the engine gave no answer"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
