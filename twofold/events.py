"""The typed events of long work.

Long work takes an `Emit` and calls it; the terminal, the log file, trackers and the page subscribe.
Work that nobody watches emits into `silent`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Pieces: TypeAlias = Generator[None, None, T]
"""Work that stops every few milliseconds, for whoever has other things to do in between."""


def finished(work: Pieces[T]) -> T:
    """What the work comes to, done in one go."""
    while True:
        try:
            next(work)
        except StopIteration as ended:
            found: T = ended.value
            return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Root of the events; `record` is what the log file keeps."""

    def record(self) -> dict[str, Any]:
        return {"event": type(self).__name__.lower(), **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """`done` of `total` units of a named task; `total` None when unknown."""

    task: str
    done: int
    total: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message(Event):
    """Something worth a line: which path was taken, where a file lies."""

    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something the user should know and may want to change."""

    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Event):
    """One optimiser step. `loss` is the mean over the step's supervised tokens; `seconds` and speed are the step's own."""

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float
    tokens_per_second: float
    memory_bytes: int
    seconds_left: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """Held-out loss during training; `best` says whether it is the lowest so far."""

    step: int
    loss: float
    token_accuracy: float
    best: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointed(Event):
    """A checkpoint is whole on disk."""

    step: int
    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrum(Event):
    """The singular values of each module's update after a step, largest first."""

    step: int
    modules: dict[str, list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """Training ends after this step because it was asked to; a checkpoint of it is whole on disk."""

    step: int


Emit: TypeAlias = Callable[[Event], None]


def silent(event: Event) -> None:
    """Nobody watches."""


@contextmanager
def working(task: str, emit: Emit) -> Iterator[None]:
    """Announce a task whose length is unknown, and its end."""
    emit(Progress(task=task, done=0))
    yield
    emit(Progress(task=task, done=1, total=1))


def fan_out(*subscribers: Emit) -> Emit:
    """One `Emit` that passes every event to each subscriber in turn."""

    def emit(event: Event) -> None:
        for subscriber in subscribers:
            subscriber(event)

    return emit
