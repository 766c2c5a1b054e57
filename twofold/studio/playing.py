"""Play over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from twofold.base.load import Precision
from twofold.server.errors import ApiError
from twofold.studio.asking import asked, parts_of
from twofold.studio.parts import Studio
from twofold.studio.play import Chat

MOST_LANES = 4
LOUDEST = 4.0
"""The page's slider goes to 2."""
MOST_TOKENS = 4096


def routes() -> list[Route]:
    """Those of this file."""
    return [
        Route("/api/play", told),
        Route("/api/play/open", open_base, methods=["POST"]),
        Route("/api/play/close", close_base, methods=["POST"]),
        Route("/api/play/chat", chat, methods=["POST"]),
    ]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A base to chat with."""

    base: str
    dtype: Precision = "auto"


async def told(request: Request) -> Response:
    """How Play stands."""
    studio: Studio = parts_of(request.app)
    return JSONResponse(studio.play.told())


async def open_base(request: Request) -> Response:
    """Begin to load a base; `GET /api/play` says when it is ready."""
    studio: Studio = parts_of(request.app)
    wanted = await asked(Opening, request)
    await studio.play.open(wanted.base, wanted.dtype)
    return JSONResponse(studio.play.told())


async def close_base(request: Request) -> Response:
    """Free the base's memory."""
    studio: Studio = parts_of(request.app)
    await studio.play.close()
    return JSONResponse(studio.play.told())


async def chat(request: Request) -> Response:
    """All lanes' answers as server-sent events."""
    studio: Studio = parts_of(request.app)
    wanted = await asked(Chat, request)
    _check(wanted)
    answers = studio.play.answers(wanted)
    first = await anext(answers, None)  # so that what is wrong with all lanes is an answer of its own

    async def events() -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield _event(first)
            async for event in answers:
                yield _event(event)
        finally:
            await answers.aclose()  # type: ignore[attr-defined]

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _check(chat: Chat) -> None:
    if not 1 <= len(chat.lanes) <= MOST_LANES:
        raise ApiError(400, f"there may be 1 to {MOST_LANES} lanes, but there are {len(chat.lanes)}")
    if any(not 0 <= lane.scale <= LOUDEST for lane in chat.lanes):
        raise ApiError(400, f"a scale must be at least 0 and at most {LOUDEST:g}")
    if not 1 <= chat.max_tokens <= MOST_TOKENS:
        raise ApiError(400, f"max_tokens is {chat.max_tokens} but must be 1 to {MOST_TOKENS}")
    if not chat.messages:
        raise ApiError(400, "there is no message to answer")


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
