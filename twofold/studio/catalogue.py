"""What lies below the roots: adapters, bases, data and runs, found without opening more than headers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from twofold.adapter.files import CONFIG, OURS, TENSORS, open_adapter
from twofold.adapter.updates import pairs_of
from twofold.data.formats import READERS
from twofold.errors import UserError
from twofold.server.errors import ApiError
from twofold.studio.roots import Roots, hidden

Kind: TypeAlias = Literal["folder", "adapter", "run", "base", "data", "other"]
DEEPEST = 4
"""Folders below a root that are looked through for adapters and bases."""
MOST_FOLDERS = 4000
"""That are looked into for one list."""
PASSED_OVER = frozenset({"node_modules", "site-packages", "__pycache__", "checkpoints"})


def kind_of(path: Path) -> Kind:
    """What a file or folder is, by the names in it."""
    if not path.is_dir():
        return "data" if path.suffix in READERS else "base" if path.suffix == ".gguf" else "other"
    if (path / CONFIG).is_file() and (path / TENSORS).is_file():
        return "adapter"
    if (path / "config.yaml").is_file() and (path / "events.jsonl").is_file():
        return "run"
    return "base" if (path / "config.json").is_file() and any(path.glob("*.safetensors")) else "folder"


def entries(roots: Roots, reference: str) -> list[dict[str, Any]]:
    """The files and folders in a folder, folders first; hidden ones and links that lead elsewhere are left out.

    Raises:
        ApiError: no such folder.
    """
    folder = roots.find(reference)
    if not folder.is_dir():
        raise ApiError(404, f"'{reference[:200]}' is no folder")
    found = []
    for name in sorted(os.listdir(folder), key=str.lower):
        try:
            path = roots.find(f"{reference.rstrip('/')}/{name}")
            size = path.stat().st_size if path.is_file() else None
        except (ApiError, OSError):
            continue
        found.append({"name": name, "path": f"{reference.rstrip('/')}/{name}", "kind": kind_of(path), "bytes": size})
    return sorted(found, key=lambda e: e["bytes"] is not None)


def adapters(roots: Roots) -> list[dict[str, Any]]:
    """Every adapter below the roots; one that cannot be read says why."""
    return [described(roots.shown(path), path) for path in _folders(roots) if kind_of(path) == "adapter"]


def bases(roots: Roots) -> list[str]:
    """Every base below the roots, as a page calls it."""
    return [roots.shown(path) for path in _folders(roots) if kind_of(path) == "base"]


def described(reference: str, path: Path) -> dict[str, Any]:
    """An adapter in a line: what it is called, its rank, modules and base."""
    states = [(path / name).stat() for name in (CONFIG, TENSORS)]
    told = _header(path, tuple((s.st_mtime_ns, s.st_size) for s in states))
    size = sum((path / n).stat().st_size for n in (CONFIG, TENSORS, OURS) if (path / n).exists())
    return {"id": reference, "name": _name(path), **told, "bytes": size}


def _name(path: Path) -> str:
    """The folder's, or its run's where it is `adapter` like every other run's."""
    return path.name if path.name not in ("adapter", "adapter-last") else f"{path.parent.name}/{path.name}"


@lru_cache(maxsize=1024)
def _header(path: Path, state: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """What the config and the names of the tensors say; `state` tells whether they are still the same."""
    try:
        files = open_adapter(path)
        names = [pair.name for pair in pairs_of(files)]
    except UserError as error:
        return {"r": None, "modules": [], "base": None, "error": str(error).replace(str(path), path.name)}
    return {"r": files.config.r, "modules": names, "base": files.base_name, "error": None}


def _folders(roots: Roots) -> Iterator[Path]:
    """The folders below the roots, nearest first; no hidden ones, no links, and none that runs keep for themselves."""
    waiting = [(path, 0) for path in roots.folders.values()]
    for seen, (folder, depth) in enumerate(waiting):
        if seen >= MOST_FOLDERS:
            return
        yield folder
        if depth < DEEPEST:
            waiting += [(path, depth + 1) for path in _below(folder)]


def _below(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            inside = [e for e in found if not hidden(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted(Path(e.path) for e in inside if e.name not in PASSED_OVER and not _is_environment(Path(e.path)))


def _is_environment(folder: Path) -> bool:
    return (folder / "pyvenv.cfg").exists()
