"""Files from a page: streamed to disk, up to a size, of the kinds that hold examples, and looked into before they are kept."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from twofold.data.formats import READERS, read_table
from twofold.errors import DataError, RunError
from twofold.server.errors import ApiError
from twofold.studio.asking import parts_of
from twofold.studio.parts import Studio

FOLDER = "uploads"
"""Below the first root."""
LONGEST = 100
"""Characters of a name, without its ending."""
PARQUET = b"PAR1"
KINDS: dict[bytes, str] = {
    b"\x80": "a Python pickle, which can run code when it is read",
    b"PK": "a zip archive (PyTorch's .pt files and .xlsx are such)",
    b"\x1f\x8b": "gzip-compressed",
    b"%PDF": "a PDF",
    b"\x7fELF": "a program",
    b"GGUF": "a GGUF model",
    b"\x89PNG": "a picture",
}
"""What files begin with that are not what their name says."""


def routes() -> list[Route]:
    """That of this file."""
    return [Route("/api/uploads", upload, methods=["POST"])]


async def upload(request: Request) -> Response:
    """Keep a file of examples below the first root; where it lies, and how many examples it holds."""
    studio: Studio = parts_of(request.app)
    limit = studio.config.max_upload_bytes
    name = safe_name(request.query_params.get("name", ""))
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large(limit)
    folder = studio.roots.home / FOLDER
    temporary = folder / f".{uuid.uuid4().hex}{Path(name).suffix}"
    try:
        folder.mkdir(exist_ok=True)
        with temporary.open("wb") as file:
            await _received(request.stream(), file, name, limit)
        found = await studio.desk.do(lambda: looked_into(temporary, name))
        path = await asyncio.to_thread(_kept, temporary, folder / name)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; free space first") from error
    finally:
        temporary.unlink(missing_ok=True)
    return JSONResponse({"path": studio.roots.shown(path), "bytes": path.stat().st_size, **found}, 201)


async def _received(stream: AsyncIterator[bytes], file: IO[bytes], name: str, limit: int) -> None:
    seen = 0
    async for piece in stream:
        if seen == 0:
            check_kind(name, piece)
        seen += len(piece)
        if seen > limit:
            raise too_large(limit)
        file.write(piece)
    if not seen:
        raise ApiError(400, f"'{name}' is empty")


def safe_name(given: str) -> str:
    """The last part of a name, of letters, digits and a few marks, with the ending of a file of examples.

    Raises:
        ApiError: no such ending, or nothing is left of it.
    """
    last = PurePosixPath(given.replace("\\", "/")).name
    suffix = PurePosixPath(last).suffix.lower()
    if suffix not in READERS:
        raise ApiError(400, f"'{_short(last)}' is no {', '.join(READERS)} file; examples come as one of these")
    stem = re.sub(r"[^\w-]+", "-", last[: -len(suffix)]).strip("-_")[:LONGEST]
    if not stem:
        raise ApiError(400, f"'{_short(last)}' cannot name a file; use letters, digits, '_' and '-'")
    return stem + suffix


def check_kind(name: str, start: bytes) -> None:
    """Refuse what begins like another kind of file than its name says.

    Raises:
        ApiError: it does.
    """
    if Path(name).suffix == ".parquet":
        if not start.startswith(PARQUET):
            raise ApiError(400, f"'{name}' is no Parquet file, whatever its name says")
        return
    found = next((words for magic, words in KINDS.items() if start.startswith(magic)), None)
    found = found or ("binary" if b"\0" in start else None)
    if found is not None:
        raise ApiError(400, f"'{name}' is {found}, not {Path(name).suffix[1:].upper()} text; nothing of it was kept")


def too_large(limit: int) -> ApiError:
    """What is said of a file over the limit."""
    said = f"the file is larger than the {limit / 2**20:,.0f} MB that an upload may have; put it into one of the folders of this "
    return ApiError(413, said + "Studio instead and choose it there, or start it with --max-upload-mb")


def looked_into(path: Path, name: str) -> dict[str, Any]:
    """How many examples a file holds, and in which form.

    Raises:
        DataError: none, unreadable ones, or columns of no known format.
    """
    try:
        table = read_table(str(path))
    except DataError as error:
        raise DataError(str(error).replace(str(path), name)) from error
    return {"examples": len(table.rows), "format": table.format, "columns": list(table.columns)}


def _kept(temporary: Path, wanted: Path) -> Path:
    """The file under its name, or the name with a number where that is taken."""
    names = (wanted if i == 1 else wanted.with_stem(f"{wanted.stem}-{i}") for i in itertools.count(1))
    for path in names:
        try:
            os.link(temporary, path)
        except FileExistsError:
            continue
        return path
    raise AssertionError  # there is always another number


def _short(name: str) -> str:
    return "".join(c for c in name if c.isprintable())[:80]
