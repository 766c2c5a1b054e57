"""The application: the page, and the routes below /api."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from twofold.server.errors import ApiError
from twofold.server.security import Policy
from twofold.studio import looking, planning, playing, training, uploads
from twofold.studio.asking import Desk, error_handlers
from twofold.studio.door import Door
from twofold.studio.parts import Studio
from twofold.studio.play import Play
from twofold.studio.roots import open_roots
from twofold.studio.runbook import RunBook
from twofold.studio.settings import StudioConfig

PAGE = Path(__file__).parent / "page"
NOT_BUILT = "Studio's page is not built in this copy of Twofold: run `make studio` (it needs Node), then reload."
FOREVER = "public, max-age=31536000, immutable"
log = logging.getLogger("twofold.studio")


def make_app(config: StudioConfig) -> Starlette:
    """The application of one Studio; `app.state.studio` is what it runs on.

    Raises:
        ConfigError: a root is no folder.
    """
    roots = open_roots(config.root)
    studio = Studio(config=config, roots=roots, desk=Desk(), runs=RunBook(roots), play=Play(roots))

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        yield
        await studio.play.close()
        studio.desk.close()

    policy = Policy(hosts=frozenset(h.lower() for h in (*config.allowed_hosts, config.host)))
    app = Starlette(
        routes=[*_api(), *_page()],
        middleware=[Middleware(Door, policy=policy, token=config.token)],
        exception_handlers=error_handlers(roots),
        lifespan=life,
    )
    app.state.studio = studio
    return app


def is_built() -> bool:
    """Whether the page is there."""
    return (PAGE / "index.html").is_file()


def _api() -> list[BaseRoute]:
    rooms = (looking, planning, training, uploads, playing)
    return [*(route for room in rooms for route in room.routes()), Route("/api/{rest:path}", _nothing)]


async def _nothing(request: Request) -> Response:
    raise ApiError(404, f"there is no {request.url.path} here")


def _page() -> list[BaseRoute]:
    assets = Mount("/assets", app=_Assets(directory=PAGE / "assets", check_dir=False))
    return [Route("/", _index), assets, Route("/{name}", _file)]


class _Assets(StaticFiles):
    """Built files, whose names change with what is in them."""

    def file_response(self, *arguments: object, **named: object) -> Response:
        answer = super().file_response(*arguments, **named)  # type: ignore[arg-type]
        answer.headers["cache-control"] = FOREVER
        return answer


async def _index(request: Request) -> Response:
    if not is_built():
        return PlainTextResponse(NOT_BUILT, 503)
    return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})


async def _file(request: Request) -> Response:
    """What lies beside the index: the lesson as one file, an icon."""
    path = PAGE / request.path_params["name"]
    if path.name.startswith(".") or path.parent != PAGE or not path.is_file():
        raise ApiError(404, f"there is no {request.url.path} here")
    return FileResponse(path, headers={"cache-control": "no-cache"})
