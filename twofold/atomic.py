"""Files and folders that are whole or absent.

Everything is written under a temporary name in the same parent, synced to disk, and renamed. A crash leaves at most
a temporary name that starts with a dot, never something that looks finished.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from twofold.errors import RunError


def _temporary_beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `path`, on failure nothing remains.

    Raises:
        RunError: the place cannot be written (full disk, read-only folder), naming it and the reason.
    """
    temporary = _temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise RunError(cannot_write(path, error)) from error
    finally:
        _remove(temporary)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `path`, on failure nothing remains.

    With `replace`, a folder already at `path` gives way only once the new one is whole.

    Raises:
        RunError: `path` exists and `replace` is not asked for, or the place cannot be written.
    """
    if path.exists() and not replace:
        raise RunError(f"{path} exists already; choose another output or remove it first")
    temporary, retired = _temporary_beside(path), _temporary_beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            sync(entry)
        if path.exists():
            os.replace(path, retired)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise RunError(cannot_write(path, error)) from error
    except RunError as error:
        raise RunError(str(error).replace(str(temporary), str(path))) from error
    finally:
        if retired.exists() and not path.exists():
            os.replace(retired, path)
        _remove(temporary)
        _remove(retired)


@contextmanager
def resumed_folder(path: Path, job: str) -> Iterator[Path]:
    """As `new_folder`, but what was written stays where the work ends early, and the same `job` finds it there again.

    Files in it must be written whole (`new_file`). What another job for the same `path` left is taken away; while one is at work,
    a second is refused.

    Raises:
        RunError: `path` exists or is being written, or the place cannot be written.
    """
    if path.exists():
        raise RunError(f"{path} exists already; choose another output or remove it first")
    temporary = path.parent / f".{path.name}.{job}.unfinished"
    try:
        for other in set(path.parent.glob(f".{glob.escape(path.name)}.*.unfinished")) - {temporary}:
            with _held(other, path):
                _remove(other)
        temporary.mkdir(parents=True, exist_ok=True)
        with _held(temporary, path):
            for half in temporary.rglob(".*.partial"):
                _remove(half)
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                sync(entry)
            os.replace(temporary, path)
            sync(path.parent)
    except OSError as error:
        raise RunError(cannot_write(path, error)) from error


@contextmanager
def _held(folder: Path, path: Path) -> Iterator[None]:
    """A lock on a folder that is being filled, which ends with the process that holds it, however that ends.

    Raises:
        RunError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{path} is being written by another process; wait for it, or choose another output"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Take away what may be a folder, a file or nothing; if it cannot be, the error that led here matters more."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def cannot_write(path: Path, error: OSError) -> str:
    """What to say of a place that cannot be written."""
    reason = error.strerror or str(error)
    return f"cannot write {path}: {reason}; free space or choose another output folder"
