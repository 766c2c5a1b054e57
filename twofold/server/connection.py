"""Work that ends when the client who asked for it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

T = TypeVar("T")


class Gone(Exception):
    """The client has left."""


async def while_connected(
    request: Request, work: Coroutine[Any, Any, T], unused: Callable[[T], None] = lambda _: None
) -> T:
    """The result of some work, which is cancelled if the client leaves; `unused` gets a result that comes too late for that.

    Raises:
        Gone: the client has left.
    """
    working = asyncio.ensure_future(work)
    taken = False
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            taken = True
            return working.result()
        raise Gone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})
        if not (taken or working.cancelled() or working.exception()):
            unused(working.result())


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
