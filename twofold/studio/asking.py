"""What the routes share: JSON in, JSON out, recipes one at a time, and every mistake as one sentence."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from twofold.config import build
from twofold.errors import TwofoldError, UserError
from twofold.server.errors import ApiError
from twofold.studio.roots import Roots

T = TypeVar("T")
Handler = Callable[[Request, Exception], Awaitable[Response]]
MOST_BODY_BYTES = 4_000_000
"""Of a request that is no upload."""
THIS = "this request"
log = logging.getLogger("twofold.studio")


class Desk:
    """Does the recipes' work one after the other, in a thread of its own: libraries below them keep state for a process."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="studio")

    async def do(self, work: Callable[[], T]) -> T:
        """The result of some work, when its turn has come; work whose client has left before that is not done."""
        return await asyncio.wrap_future(self._thread.submit(work))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object that a request carries.

    Raises:
        ApiError: it is too long, no JSON object, or holds a text that cannot be written as UTF-8.
    """
    found, seen = bytearray(), 0
    async for piece in request.stream():  # to its end, for who is still sending hears no answer
        seen += len(piece)
        found += piece if seen <= MOST_BODY_BYTES else b""
    if seen > MOST_BODY_BYTES:
        raise ApiError(413, f"a request may have at most {MOST_BODY_BYTES} bytes")
    try:
        value = json.loads(found)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "a text in this request has half of a surrogate pair, which is no character") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the request is not valid JSON") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the request should be a JSON object")
    return value


async def asked(cls: type[T], request: Request) -> T:
    """The request as a dataclass; every mistake in it at once.

    Raises:
        ConfigError: an unknown key, a missing one, or a value of the wrong type.
    """
    return build(cls, await body_of(request), source=THIS)


def of_object(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object below a key of a request.

    Raises:
        ApiError: there is none.
    """
    found = values.get(key)
    if not isinstance(found, dict):
        raise ApiError(400, f"{THIS} needs '{key}', a JSON object")
    return dict(found)


def error_handlers(roots: Roots) -> dict[Any, Any]:
    """By kind of error, the answer: `{"error": {"message": one sentence}}`, paths as a page calls them."""

    async def api(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body().model_dump(), error.status, error.headers)

    async def told(request: Request, error: Exception) -> Response:
        status = 400 if isinstance(error, UserError) else 500
        return await api(request, ApiError(status, roots.worded(str(error))))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return await api(request, ApiError(error.status_code, str(error.detail)))

    async def ours(request: Request, error: Exception) -> Response:
        log.error("a request failed: %s", request.url.path, exc_info=error)
        return await api(request, ApiError(500, "Studio failed at this request; its log has the reason"))

    return {ApiError: api, TwofoldError: told, HTTPException: http, Exception: ours}


def parts_of(app: Starlette) -> Any:
    """What the routes run on (`app.Studio`)."""
    return app.state.studio
