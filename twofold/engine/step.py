"""What one forward pass of the engine runs over: the newest tokens of each stream, and whose adapters they have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from twofold.engine.cache import Slots
from twofold.engine.resident import Resident
from twofold.events import Pieces

Worn = tuple[tuple[Resident, float], ...]
"""The adapters of a stream, with how much of each."""


class Part(NamedTuple):
    """What one stream brings to a pass.

    Attributes:
        slot: where its keys and values are.
        start: how many tokens the slot holds before these.
        asked: whether the logits behind the last of its tokens are wanted.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    worn: Worn
    asked: bool


class Wearing(NamedTuple):
    """The rows of a pass that have a resident, and how much of it."""

    resident: Resident
    rows: list[int]
    weights: list[float]

    def of(self, rows: Sequence[int]) -> Wearing:
        """The same over some rows of the pass, by their numbers among those."""
        new = {row: i for i, row in enumerate(rows)}
        kept = [(new[r], v) for r, v in zip(self.rows, self.weights, strict=True) if r in new]
        return Wearing(self.resident, [r for r, _ in kept], [v for _, v in kept])


def wearing(parts: Sequence[Part]) -> list[Wearing]:
    """Each resident that occurs, with its rows."""
    found: dict[Resident, Wearing] = {}
    for part, first in zip(parts, firsts(parts), strict=True):
        for resident, weight in part.worn:
            if weight:
                one = found.setdefault(resident, Wearing(resident, [], []))
                one.rows.extend(range(first, first + len(part.tokens)))
                one.weights.extend([weight] * len(part.tokens))
    return list(found.values())


def firsts(parts: Sequence[Part]) -> Iterator[int]:
    """The first row of each part."""
    row = 0
    for part in parts:
        yield row
        row += len(part.tokens)


@runtime_checkable
class Forward(Protocol):
    """A model's forward pass over the streams of the engine.

    Attributes:
        path: which operations run, and why.
    """

    path: str

    @property
    def slots(self) -> Slots:
        """Where the streams' keys and values are."""
        ...

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that are folded into a second copy of the weights."""
        ...

    def run(self, parts: Sequence[Part]) -> Float[Tensor, "asked vocabulary"]:
        """Logits behind the last token of each part that is asked."""
        ...

    def reading(self, key: str, folder: Path) -> Pieces[Resident]:
        """Make an adapter ready to be worn; AdapterFileError if it does not fit."""
        ...

    def check(self, worn: Worn) -> None:
        """ConfigError if no stream can have these adapters together, so much of each."""
        ...

    def bytes_of(self, resident: Resident) -> int:
        """What an adapter takes of memory."""
        ...

    def drop(self, resident: Resident) -> None:
        """Forget an adapter that no stream wears."""
        ...
