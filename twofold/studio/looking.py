"""What a page looks at and makes of adapters. Thin, over the recipes of the command line."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from twofold.adapter.files import open_adapter
from twofold.base.load import BUILT_IN
from twofold.machine import checked_device, memory_capacity, pick_device
from twofold.merging.methods import Combination
from twofold.merging.resize import Size
from twofold.recipes.combine import combine
from twofold.recipes.inspect import DIRECTIONS, compare, inspect_adapter
from twofold.recipes.resize import resize
from twofold.server.errors import ApiError
from twofold.studio.asking import asked, parts_of
from twofold.studio.catalogue import adapters, bases, entries
from twofold.studio.choices import choices, defaults
from twofold.studio.parts import Studio
from twofold.studio.pictures import energy_curve, module_picture
from twofold.studio.roots import SAMPLE, Roots

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a new adapter may be called."""
MADE = "adapters"
"""The folder of the first root that new adapters go to."""


def routes() -> list[Route]:
    """Those of this file."""
    return [
        Route("/api/about", about),
        Route("/api/files", list_files),
        Route("/api/adapters", list_adapters),
        Route("/api/adapters/module", module),
        Route("/api/inspect", inspect, methods=["POST"]),
        Route("/api/lint", lint, methods=["POST"]),
        Route("/api/compare", compare_two, methods=["POST"]),
        Route("/api/combine/preview", preview_combination, methods=["POST"]),
        Route("/api/combine", combine_several, methods=["POST"]),
        Route("/api/resize/curve", resize_curve, methods=["POST"]),
        Route("/api/resize", resize_one, methods=["POST"]),
    ]


# ---------------------------------------------------------------------------------------------- what there is


async def about(request: Request) -> Response:
    """The machine, the folders, and the words and defaults of every setting."""
    studio: Studio = parts_of(request.app)
    device = pick_device()
    return JSONResponse(
        {
            "version": version("twofold"),
            "device": device,
            "cores": os.cpu_count(),
            "memory_bytes": memory_capacity(checked_device(device)),
            "bases": [*BUILT_IN, *await asyncio.to_thread(bases, studio.roots)],
            "roots": [{"name": name, "path": str(path)} for name, path in studio.roots.folders.items()],
            "sample": sample_id(studio.roots),
            "upload_limit": studio.config.max_upload_bytes,
            "defaults": defaults(),
            "choices": choices(),
        }
    )


def sample_id(roots: Roots) -> str | None:
    """The adapter that ships, as a page calls it."""
    shipped = Roots({SAMPLE: roots.folders[SAMPLE]}) if SAMPLE in roots.folders else None
    found = adapters(shipped) if shipped else []
    return str(found[0]["id"]) if found else None


async def list_files(request: Request) -> Response:
    """A folder below a root."""
    studio: Studio = parts_of(request.app)
    root, path = request.query_params.get("root", ""), request.query_params.get("path", "").strip("/")
    reference = f"{root}/{path}" if path else root
    return JSONResponse({"entries": await asyncio.to_thread(entries, studio.roots, reference)})


async def list_adapters(request: Request) -> Response:
    """Every adapter below the roots."""
    studio: Studio = parts_of(request.app)
    return JSONResponse({"adapters": await asyncio.to_thread(adapters, studio.roots)})


async def module(request: Request) -> Response:
    """One module of an adapter, to be drawn at any rank."""
    studio: Studio = parts_of(request.app)
    folder = studio.roots.folder(request.query_params.get("adapter", ""))
    name = request.query_params.get("module", "")
    return JSONResponse(await studio.desk.do(lambda: module_picture(open_adapter(folder), name)))


# ---------------------------------------------------------------------------------------------- looking closer


@dataclass(frozen=True, kw_only=True)
class OfOne:
    """An adapter, beside its base if that is given."""

    adapter: str
    base: str | None = None
    intruders: bool = False


@dataclass(frozen=True, kw_only=True)
class OfTwo:
    """Two adapters."""

    a: str
    b: str


async def inspect(request: Request) -> Response:
    """As `twofold inspect --json`."""
    return JSONResponse(await _inspected(request))


async def lint(request: Request) -> Response:
    """The findings alone."""
    return JSONResponse({"findings": (await _inspected(request))["findings"]})


async def _inspected(request: Request) -> dict[str, Any]:
    studio: Studio = parts_of(request.app)
    one = await asked(OfOne, request)
    folder = studio.roots.folder(one.adapter)
    base = None if one.base is None else studio.roots.base(one.base)
    directions = DIRECTIONS if one.intruders else 0
    found = await studio.desk.do(lambda: inspect_adapter(folder, base, intruders=directions).as_json())
    for finding in found["findings"]:
        finding["message"] = studio.roots.worded(finding["message"])
    return found


async def compare_two(request: Request) -> Response:
    """As `twofold compare --json`."""
    studio: Studio = parts_of(request.app)
    two = await asked(OfTwo, request)
    first, second = studio.roots.folder(two.a), studio.roots.folder(two.b)
    return JSONResponse(await studio.desk.do(lambda: compare(first, second).as_json()))


async def resize_curve(request: Request) -> Response:
    """What each rank keeps."""
    studio: Studio = parts_of(request.app)
    folder = studio.roots.folder((await asked(OfOne, request)).adapter)
    return JSONResponse(await studio.desk.do(lambda: energy_curve(open_adapter(folder))))


# ---------------------------------------------------------------------------------------------- making new ones


@dataclass(frozen=True, kw_only=True)
class Part:
    """An adapter and how much of it."""

    id: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Combining:
    """Several adapters as one."""

    adapters: tuple[Part, ...]
    method: str = Combination.method
    r: int | None = Combination.r
    density: float = Combination.density
    base: str | None = None
    seed: int = 0
    output: str | None = None


@dataclass(frozen=True, kw_only=True)
class Resizing:
    """An adapter at another rank."""

    adapter: str
    output: str
    r: int | None = None
    energy: float | None = None


async def preview_combination(request: Request) -> Response:
    """As `twofold combine --preview --json`."""
    return await _combined(request, writes=False)


async def combine_several(request: Request) -> Response:
    """As `twofold combine --json`."""
    return await _combined(request, writes=True)


async def _combined(request: Request, *, writes: bool) -> Response:
    studio: Studio = parts_of(request.app)
    how = await asked(Combining, request)
    weights: dict[str | Path, float] = {studio.roots.folder(p.id): p.weight for p in how.adapters}
    if len(weights) < len(how.adapters) or not weights:
        raise ApiError(400, "name at least one adapter, and each only once")
    output = new_folder(studio.roots, how.output or "") if writes else None
    base = None if how.base is None else studio.roots.base(how.base)
    found = await studio.desk.do(
        lambda: combine(weights, output, method=how.method, r=how.r, density=how.density, base=base, seed=how.seed)
    )
    for one in found["adapters"]:
        one["path"] = studio.roots.shown(one["path"])
    return JSONResponse({**found, "output": None if output is None else studio.roots.shown(output)})


async def resize_one(request: Request) -> Response:
    """As `twofold resize --json`."""
    studio: Studio = parts_of(request.app)
    how = await asked(Resizing, request)
    size = Size(r=how.r, energy=how.energy)
    folder, output = studio.roots.folder(how.adapter), new_folder(studio.roots, how.output)
    found = await studio.desk.do(lambda: resize(folder, output, size))
    return JSONResponse({**found, "output": studio.roots.shown(output)})


def new_folder(roots: Roots, name: str) -> Path:
    """Where a new adapter of that name goes.

    Raises:
        ApiError: it cannot be called so.
    """
    if not NAME.fullmatch(name):
        raise ApiError(400, f"'{name[:80]}' cannot name an adapter; use letters, digits, '.', '_' and '-'")
    return roots.home / MADE / name
