"""A Studio over a folder of its own, on a free port of loopback; what a page would ask it, and its streams read to the end."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from twofold.studio.app import make_app
from twofold.studio.settings import StudioConfig

SECONDS = 120.0
"""For which a test waits for a process: others may be at work on the machine."""


@dataclass
class Live:
    """A Studio that runs; `root` is its only folder, called `work`."""

    url: str
    root: Path
    app: Any

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=SECONDS, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body if body is not None else {}, timeout=SECONDS, **more)

    def made(self, path: str, body: Any = None) -> Any:
        """The answer to a request that must succeed."""
        found = self.post(path, body)
        assert found.status_code in (200, 201), found.text
        return found.json()

    def refusal(self, path: str, body: Any = None, status: int = 400) -> str:
        """The sentence of a request that must be refused."""
        found = self.post(path, body)
        assert found.status_code == status, found.text
        return sentence(found)

    def state(self, run: str) -> str:
        return str(self.get(f"/api/runs/{run}").json()["state"])

    def wait(self, run: str, *states: str) -> str:
        """Until a run is in one of the states."""
        return eventually(lambda: (s := self.state(run)) in states and s)

    def steps(self, run: str) -> list[int]:
        """Numbers of the steps that a run has recorded."""
        found = self.get(f"/api/runs/{run}/events").json()["events"]
        return [e["step"] for e in found if e["event"] == "step"]

    @contextlib.contextmanager
    def follow(self, run: str, **headers: str) -> Iterator[Iterator[tuple[str, str, Any]]]:
        """A run's stream, as (kind, id, data)."""
        accept = {"accept": "text/event-stream", **headers}
        with httpx.stream("GET", f"{self.url}/api/runs/{run}/events", headers=accept, timeout=SECONDS) as answer:
            assert answer.status_code == 200
            yield sent(answer.iter_lines())


def sent(lines: Iterator[str]) -> Iterator[tuple[str, str, Any]]:
    """Server-sent events as (kind, id, data)."""
    kind, at = "message", ""
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("id: "):
            at = line.removeprefix("id: ")
        elif line.startswith("data: "):
            yield kind, at, json.loads(line.removeprefix("data: "))
            kind = "message"


def sentence(answer: httpx.Response) -> str:
    """What an error says: one sentence, and nothing of how the program is made."""
    said = str(answer.json()["error"]["message"])
    assert "Traceback" not in said
    assert "\n" not in said
    return said


def eventually(holds: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Wait until something holds; what it is then."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def open_studio(root: Path, **settings: Any) -> Iterator[Live]:
    """uvicorn in a thread of its own."""
    app = make_app(StudioConfig(root=(root,), open=False, **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started or not thread.is_alive())
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Live(f"http://127.0.0.1:{port}", root, app)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def needed(what: str, there: bool) -> None:
    """Skip a test whose tool is not there; in CI that is a failure."""
    if there:
        return
    if os.environ.get("TWOFOLD_NEEDS_ALL"):
        pytest.fail(f"this test needs {what}")
    pytest.skip(f"needs {what}")
