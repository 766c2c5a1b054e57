"""The adapter folder that all engines share, and what may be read from it.

    ROOT/NAME/                    a plain adapter; it gets its content hash when it is read
    ROOT/NAME@HASH/               one generation, which never changes
    ROOT/NAME.current             a line that says which generation NAME stands for: `NAME@HASH`

vLLM, Ray Serve and others are pointed at the folder of a generation. Nothing outside ROOT is read, links resolved. An adapter is
copied before it is read: what is hashed, checked and loaded is then the same bytes, whatever happens to the folder.

Other engines read the folder by this file too, inside their own processes: it imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from twofold.adapter.folder import CONFIG, OURS, TENSORS
from twofold.errors import AdapterFileError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What an adapter may be called: no `/`, no `:` and no `@`, which separate it from its base and its generation."""
GENERATION = re.compile(rf"({NAME.pattern})@([0-9a-f]{{8,64}})")
CURRENT = ".current"
DIGITS = 16
"""Of the hash in a generation's name."""
MAX_TEXT_BYTES = 8_000_000
"""The most that an adapter's JSON files may hold."""


class Limits(NamedTuple):
    """What an adapter may be at most."""

    bytes: int
    rank: int


class FileState(NamedTuple):
    """What tells whether a file is still the same, without reading it."""

    inode: int
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Source:
    """Where an adapter lies, and in what state its files were last seen.

    Attributes:
        name: what it is asked for by.
        folder: below the root, links resolved.
        files: config, tensors, and Twofold's own where there is one.
        digest: of the folder's name, where that has one.
    """

    name: str
    folder: Path
    files: tuple[FileState | None, ...]
    digest: str | None = None

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.files if f)


# ---------------------------------------------------------------------------------------------- finding


def scan(root: Path) -> dict[str, Source]:
    """All adapters below a root by the names that requests may use; what is no adapter or lies elsewhere is left out."""
    root = root.resolve()
    entries = list(_entries(root))
    usable = [e.name for e in entries if NAME.fullmatch(e.name) or GENERATION.fullmatch(e.name)]
    links = {e.name for e in entries if e.is_symlink()}
    found = {name: _source(root, (root / name).resolve() if name in links else root / name) for name in usable}
    named = {name: source for name, source in found.items() if source is not None}
    for name in [e.name.removesuffix(CURRENT) for e in entries if e.name.endswith(CURRENT)]:
        if chosen := _chosen(root, named, name):
            named[name] = chosen
    return named


def source_named(root: Path, name: str) -> Source | None:
    """What a name stands for in the folder now."""
    if not NAME.fullmatch(name):
        return None
    root = root.resolve()
    return _chosen(root, {}, name) or _source(root, (root / name).resolve())


def _chosen(root: Path, named: dict[str, Source], name: str) -> Source | None:
    """What an alias says that a name stands for, if there is such an alias and it does so."""
    found = _generation(root, named, _pointed_at(root / f"{name}{CURRENT}"))
    return found if found is not None and found.name == name else None


def _generation(root: Path, named: dict[str, Source], name: str) -> Source | None:
    """One that an alias points to; looked for once more if it has come after the folder was listed."""
    if name in named or not GENERATION.fullmatch(name):
        return named.get(name)
    return _source(root, (root / name).resolve())


def _entries(root: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            yield from entries
    except OSError:
        return


def _pointed_at(alias: Path) -> str:
    try:
        return alias.read_text(encoding="utf-8")[:256].strip()
    except (OSError, UnicodeDecodeError):
        return ""


def source_at(root: Path, given: str) -> Source:
    """The adapter at a path that a client gave, absolute or below the root; at the name of an alias, what that stands for now.

    Raises:
        AdapterFileError: there is none, or it lies outside the root; in the same words, so that nobody can feel their way.
    """
    root = root.resolve()
    try:
        source = source_named(root, given) or _source(root, (root / given).resolve())
    except (OSError, ValueError, RuntimeError):
        source = None
    if source is None:
        raise AdapterFileError("no adapter lies there below the adapter root of this server")
    return source


def _source(root: Path, folder: Path) -> Source | None:
    """The adapter in a folder, links resolved, if it is one and lies below the root with all of its files."""
    if root not in folder.parents:
        return None
    states = tuple(_state(root, f"{folder}/{name}") for name in (CONFIG, TENSORS, OURS))
    if states[0] is None or states[1] is None:
        return None
    parts = GENERATION.fullmatch(folder.name)
    return Source(parts[1] if parts else folder.name, folder, states, parts[2] if parts else None)


def _state(root: Path, path: str) -> FileState | None:
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            target = Path(path).resolve()
            if root not in target.parents:
                return None
            found = target.stat()
    except OSError:
        return None
    return FileState(found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


# ---------------------------------------------------------------------------------------------- reading


def snapshot(source: Source, root: Path, to: Path, limits: Limits, rest: Callable[[], None] = lambda: None) -> str:
    """Copy an adapter's files into an empty folder; the hash of what was copied.

    Args:
        rest: called after each megabyte.

    Raises:
        AdapterFileError: it is gone, too large, or not what its folder's name says.
        OSError: it cannot be read or copied now.
    """
    if source.bytes > limits.bytes:
        raise AdapterFileError(
            f"adapter '{source.name}' has {source.bytes} bytes, more than the {limits.bytes} of this server"
        )
    root = root.resolve()
    for name, most in ((CONFIG, MAX_TEXT_BYTES), (TENSORS, limits.bytes), (OURS, MAX_TEXT_BYTES)):
        path = (source.folder / name).resolve()
        if root in path.parents and (name != OURS or path.exists()):
            _copy(path, to / name, most, source.name, rest)
    found = content_hash(to, rest)
    if source.digest is not None and not found.startswith(source.digest[:DIGITS]):
        raise AdapterFileError(f"the files of '{source.name}@{source.digest}' are not those that its name promises")
    return found


def _copy(path: Path, to: Path, most: int, name: str, rest: Callable[[], None]) -> None:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            there = os.fstat(file.fileno())
            if not stat.S_ISREG(there.st_mode) or there.st_size > most:
                raise AdapterFileError(f"{path.name} of adapter '{name}' is no file of at most {most} bytes")
            with to.open("wb") as copy:
                for piece in _pieces(file, rest):
                    copy.write(piece)
    except FileNotFoundError as error:
        raise AdapterFileError(f"cannot read {path.name} of adapter '{name}': {error.strerror}") from error


def _pieces(file: BinaryIO, rest: Callable[[], None]) -> Iterator[bytes]:
    while piece := file.read(1 << 20):
        yield piece
        rest()


def content_hash(folder: Path, rest: Callable[[], None] = lambda: None) -> str:
    """The hash that names a generation: SHA-256 over an adapter's files, their names and lengths, shortened."""
    digest = hashlib.sha256()
    for name in (CONFIG, TENSORS, OURS):
        path = folder / name
        if path.exists():
            digest.update(f"{name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                for piece in _pieces(file, rest):
                    digest.update(piece)
    return digest.hexdigest()[:DIGITS]
