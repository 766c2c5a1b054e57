"""Runs over HTTP: begin, look, follow, stop, resume; and the pre-flight, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from twofold.config import write_yaml
from twofold.recipes.settings import TrainConfig
from twofold.server.errors import ApiError
from twofold.studio.asking import THIS, body_of, of_object, parts_of
from twofold.studio.configuration import train_config
from twofold.studio.parts import Studio
from twofold.studio.records import START, read_from
from twofold.studio.runbook import ENDED, SAID, Run, RunBook

LOOK_SECONDS = 0.2
"""Between two looks at a run's events while it is followed."""
ALIVE_SECONDS = 15.0
"""After which a silent stream says that it is alive."""


def routes() -> list[Route]:
    """Those of this file."""
    return [
        Route("/api/preflight", preflight, methods=["POST"]),
        Route("/api/runs", list_runs),
        Route("/api/runs", begin, methods=["POST"]),
        Route("/api/runs/{name}", details),
        Route("/api/runs/{name}/events", events),
        Route("/api/runs/{name}/stop", stop, methods=["POST"]),
        Route("/api/runs/{name}/resume", resume, methods=["POST"]),
    ]


async def list_runs(request: Request) -> Response:
    """All runs, newest first."""
    studio: Studio = parts_of(request.app)
    return JSONResponse({"runs": await asyncio.to_thread(studio.runs.rows)})


async def begin(request: Request) -> Response:
    """Start a training."""
    studio: Studio = parts_of(request.app)
    values = await body_of(request)
    name = values.get("name")
    if name is not None and not isinstance(name, str):
        raise ApiError(400, f"{THIS} has a 'name' that is no text")
    config = train_config(studio.roots, of_object(values, "config"))
    return JSONResponse({"name": await asyncio.to_thread(studio.runs.begin, config, name or None)}, 201)


async def details(request: Request) -> Response:
    """One run but for its events."""
    studio: Studio = parts_of(request.app)
    return JSONResponse(await asyncio.to_thread(studio.runs.details, request.path_params["name"]))


async def stop(request: Request) -> Response:
    """Ask a training to write a checkpoint and end."""
    return await _changed(request, lambda runs: runs.stop)


async def resume(request: Request) -> Response:
    """Go on with a training."""
    return await _changed(request, lambda runs: runs.resume)


async def _changed(request: Request, change: Callable[[RunBook], Callable[[str], None]]) -> Response:
    studio: Studio = parts_of(request.app)
    name = request.path_params["name"]
    await asyncio.to_thread(change(studio.runs), name)
    return JSONResponse(await asyncio.to_thread(lambda: studio.runs.told(studio.runs.run(name))))


# ---------------------------------------------------------------------------------------------- following


async def events(request: Request) -> Response:
    """A run's events from a cursor on: all that there are, or as server-sent events until the run ends."""
    studio: Studio = parts_of(request.app)
    run = studio.runs.run(request.path_params["name"])
    cursor = request.headers.get("last-event-id") or request.query_params.get("since") or START
    if "text/event-stream" in request.headers.get("accept", ""):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(followed(studio.runs, run, cursor), media_type="text/event-stream", headers=headers)
    found = await asyncio.to_thread(read_from, run.folder.events, cursor)
    return JSONResponse({"events": [e for _, e in found.events], "cursor": found.cursor, "anew": found.anew})


async def followed(runs: RunBook, run: Run, cursor: str) -> AsyncIterator[bytes]:
    """Each event with the cursor behind it as its id; `anew` when what was sent before no longer holds; `state` as it changes."""
    told: dict[str, Any] = {}
    spoken = time.monotonic()
    while True:
        state = await asyncio.to_thread(runs.told, run)  # before the events: when it has ended, they are all there
        found = await asyncio.to_thread(read_from, run.folder.events, cursor)
        cursor = found.cursor
        if found.anew:
            yield b"event: anew\ndata: {}\n\n"
        for at, event in found.events:
            yield _sent(event, f"id: {at}\n")
        if state != told:
            yield _sent(state, "event: state\n")
            told = state
        if state["state"] in ENDED:
            return
        if found.events:
            spoken = time.monotonic()
        elif time.monotonic() - spoken > ALIVE_SECONDS:
            spoken = time.monotonic()
            yield b": alive\n\n"
        await asyncio.sleep(LOOK_SECONDS)


def _sent(value: Any, head: str) -> bytes:
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


# ---------------------------------------------------------------------------------------------- pre-flight


async def preflight(request: Request) -> Response:
    """As `twofold train --dry-run --json`, in a process of its own, for it loads the base."""
    studio: Studio = parts_of(request.app)
    config = train_config(studio.roots, of_object(await body_of(request), "config"))
    async with studio.one_preflight:
        return JSONResponse(await _dry_run(studio, config))


async def _dry_run(studio: Studio, config: TrainConfig) -> Any:
    with tempfile.TemporaryDirectory(prefix="twofold-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(write_yaml(replace(config, output=str(Path(folder) / "run"))), encoding="utf-8")
        command = (sys.executable, "-m", "twofold", "train", str(file), "--dry-run", "--json")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )
        try:
            out, said = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if process.returncode == 0:
        return json.loads(out)
    sentences = [s.removeprefix(SAID) for s in said.decode("utf-8", "replace").splitlines() if s.startswith(SAID)]
    status = 400 if process.returncode == 2 else 500
    raise ApiError(status, studio.roots.worded(sentences[-1] if sentences else "the pre-flight ended without a word"))
