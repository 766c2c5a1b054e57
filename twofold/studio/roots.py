"""The folders that Studio may look into, by name: whatever a page asks for is found below one of them, or not at all.

A page says `ROOT/REL`. Links are resolved before anything is looked at, hidden names and those that are no text are nobody's
business, and what lies elsewhere is refused in the words that refuse what is not there, so that nobody can feel their way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from twofold.base.known_shapes import KNOWN_SHAPES
from twofold.base.load import BUILT_IN
from twofold.errors import ConfigError
from twofold.server.errors import PATH, ApiError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
UNDECODED = re.compile("[\ud800-\udfff]")
SAMPLE = "sample"
SAMPLE_FOLDER = Path(__file__).parent / "sample"
"""A small trained adapter that ships with Studio."""
MOST_FILES = 10_000
"""Of a folder whose files are looked at for links that lead elsewhere."""


@dataclass(frozen=True)
class Roots:
    """Folders by name, links resolved; the first of them takes what is made."""

    folders: Mapping[str, Path]

    @property
    def home(self) -> Path:
        """Where runs and uploads go."""
        return next(iter(self.folders.values()))

    def find(self, reference: str) -> Path:
        """The file or folder that a page calls `ROOT/REL`.

        Raises:
            ApiError: 404; there is none, or it lies outside.
        """
        name, _, rest = reference.partition("/")
        root = self.folders.get(name)
        parts = [p for p in rest.split("/") if p]
        try:
            found = root.joinpath(*parts).resolve(strict=True) if root and not any(map(hidden, parts)) else None
        except (OSError, ValueError, RuntimeError):
            found = None
        if found is None or not self._holds(found):
            raise ApiError(404, f"nothing lies at '{reference[:200]}' in the folders of this Studio")
        return found

    def folder(self, reference: str) -> Path:
        """A folder, no file of which lies elsewhere by a link.

        Raises:
            ApiError: 404; there is none, or it reaches outside.
        """
        found = self.find(reference)
        if not found.is_dir():
            raise ApiError(404, f"'{reference[:200]}' is no folder")
        for file in _linked(found):
            if not self._holds(file.resolve()):
                raise ApiError(404, f"'{reference[:200]}' holds a link that leads out of the folders of this Studio")
        return found

    def readable(self, reference: str) -> Path:
        """A file, or a folder none of whose files lies elsewhere."""
        found = self.find(reference)
        return self.folder(reference) if found.is_dir() else found

    def base(self, reference: str) -> str:
        """What a base is called by the recipes: a built-in or known name, a hub id, or a path below the roots.

        Raises:
            ApiError: none of these.
        """
        if reference in BUILT_IN or reference in KNOWN_SHAPES:
            return reference
        return self.named_or_found(reference)

    def named_or_found(self, reference: str) -> str:
        """A path below the roots, or a hub id that is no path at all."""
        if reference.partition("/")[0] in self.folders:
            return str(self.readable(reference))
        if HUB_ID.fullmatch(reference) and not Path(reference).exists():
            return reference
        raise ApiError(404, f"nothing is called '{reference[:200]}' in the folders of this Studio, and it is no hub id")

    def shown(self, path: Path | str) -> str:
        """A path as a page calls it; others as they are."""
        for name, root in self.folders.items():
            if Path(path) == root:
                return name
            if root in Path(path).parents:
                return f"{name}/{Path(path).relative_to(root).as_posix()}"
        return str(path)

    def worded(self, sentence: str) -> str:
        """A sentence in which every path below a root is called as a page calls it."""
        return PATH.sub(lambda found: self.shown(found[0]), sentence)

    def _holds(self, path: Path) -> bool:
        return any(_below(root, path) for root in self.folders.values())


def open_roots(given: tuple[Path, ...]) -> Roots:
    """The roots of a Studio, and its sample.

    Raises:
        ConfigError: a root is no folder, or two have one name.
    """
    found: dict[str, Path] = {}
    for path in given or (Path.cwd(),):
        root = path.expanduser().resolve()
        if not root.is_dir():
            raise ConfigError(f"no folder at {path}; make it first, or choose another --root")
        name = re.sub(r"[^\w.-]+", "-", root.name).strip("-.") or "files"
        if name in found or name == SAMPLE:
            raise ConfigError(f"two roots would be called '{name}'; rename a folder or leave one out")
        found[name] = root
    return Roots({**found, **({SAMPLE: SAMPLE_FOLDER.resolve()} if SAMPLE_FOLDER.is_dir() else {})})


def hidden(name: str) -> bool:
    """Whether a page is not to hear of a file or folder: it begins with a dot, or its bytes are no UTF-8."""
    return name.startswith(".") or UNDECODED.search(name) is not None


def _below(root: Path, path: Path) -> bool:
    return path == root or (root in path.parents and not any(map(hidden, path.relative_to(root).parts)))


def _linked(folder: Path) -> Iterator[Path]:
    """The links in a folder and the folders in it; it must not be too large to be looked through."""
    seen = 0
    for at, folders, files in os.walk(folder):
        seen += len(files)
        if seen > MOST_FILES:
            raise ApiError(400, f"'{folder.name}' holds more than {MOST_FILES} files; choose a folder inside it")
        yield from (p for p in (Path(at, name) for name in (*folders, *files)) if p.is_symlink())
