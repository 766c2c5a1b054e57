"""The end of the server's time: requests that are not answered by then end with an error, and are not cut off."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twofold.server.errors import draining


class OpenRequests:
    """The requests that are being answered.

    Attributes:
        ended: whether the server's time is over.
    """

    def __init__(self) -> None:
        self.ended = False
        self.tasks: set[asyncio.Task[object]] = set()

    def end(self) -> None:
        """Have each of them end now, with an error."""
        self.ended = True
        for task in self.tasks:
            task.cancel()


class Ending:
    """Says an error in place of what a request that was ended has not said: 503, or the last event of a stream."""

    def __init__(self, app: ASGIApp, requests: OpenRequests) -> None:
        self.app, self.requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        if scope["type"] != "http" or task is None:
            await self.app(scope, receive, send)
            return
        started: Message | None = None

        async def sending(message: Message) -> None:
            nonlocal started
            started = started or message
            await send(message)

        self.requests.tasks.add(task)
        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:
            if not self.requests.ended:
                raise
            await _end(started, scope, receive, send)
        finally:
            self.requests.tasks.discard(task)


async def _end(started: Message | None, scope: Scope, receive: Receive, send: Send) -> None:
    """What can still be said of the end; in the middle of a whole answer that is nothing."""
    error = draining()
    if started is None:
        await JSONResponse(error.body().model_dump(), error.status, error.headers)(scope, receive, send)
    elif Headers(raw=started["headers"]).get("content-type", "").startswith("text/event-stream"):
        await send({"type": "http.response.body", "body": error.event()})
