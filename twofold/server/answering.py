"""One question on its way: admitted, given an adapter, put into the engine, and answered piece by piece."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from twofold.engine.request import Request, TokenLogprobs
from twofold.engine.scheduler import Ended
from twofold.engine.text import TextStream
from twofold.server.errors import ApiError, draining
from twofold.server.metrics import Clock
from twofold.server.worker import Admitted, Event, Sink, Stream, Worker

REMEMBERED = 0.2
"""Weight of the newest answer in the mean duration."""
LONGEST_WAIT = 60


class Admission:
    """The bounded queue: so many answers at a time, in the engine or on their way to it."""

    def __init__(self, at_once: int, waiting: int) -> None:
        self.at_once, self.limit = at_once, at_once + waiting
        self.inside = 0
        self.draining = False
        self._seconds = 1.0

    def enter(self, count: int) -> None:
        """Take places.

        Raises:
            ApiError: 429 when there are not enough, 503 while the server shuts down; both say when to ask again.
        """
        if self.draining:
            raise draining()
        if count > self.limit:
            raise ApiError(400, f"{count} answers at once are more than the {self.limit} places of this server")
        if self.inside + count > self.limit:
            said = f"all {self.limit} places are taken; ask again in {self._wait()} s"
            raise ApiError(429, said, code="queue_full", retry_after=self._wait())
        self.inside += count

    def leave(self, count: int, seconds: float) -> None:
        """Give places back after so long."""
        self.inside -= count
        self._seconds += REMEMBERED * (seconds - self._seconds)

    def _wait(self) -> int:
        """Seconds until a place should be free: one comes free every mean duration over the answers at once."""
        return min(max(math.ceil(self._seconds / self.at_once), 1), LONGEST_WAIT)


def too_late() -> ApiError:
    """What is said when the deadline has passed."""
    return ApiError(504, "there was no whole answer within the time that this server allows", code="deadline")


class Piece(NamedTuple):
    """Newly certain text of one choice; `finish` comes with its last piece."""

    choice: int
    text: str
    logprobs: list[TokenLogprobs]
    finish: str | None


class Choice:
    """The text of one answer as it grows."""

    def __init__(self, index: int, tokenizer: Any, stops: list[str], clock: Clock) -> None:
        self.index, self.clock = index, clock
        self.text = TextStream(tokenizer, stops)
        self.tokens = 0
        self.finish: str | None = None
        self._logprobs: list[TokenLogprobs] = []

    def take(self, event: Event) -> Piece | None:
        """What there is to say after an event of the engine, if anything."""
        if isinstance(event, Admitted):
            self.clock.begin(event.at)
            return None
        if self.finish is not None:
            return None
        if isinstance(event, Ended):
            return self._end(event)
        self.tokens += 1
        self.clock.token()
        if event.logprobs is not None:
            self._logprobs.append(event.logprobs)
        text = self.text.put(event.token)
        return self._piece(text, "stop") if self.text.stopped else self._piece(text, None) if text else None

    def _end(self, event: Ended) -> Piece:
        if event.reason in ("error", "cancelled"):
            status = 400 if event.form else 500 if event.reason == "error" else 503
            raise ApiError(status, event.message or "the answer was ended by the server", code=f"engine_{event.reason}")
        rest = self.text.finish()
        return self._piece(rest, "stop" if self.text.stopped else event.reason)

    def _piece(self, text: str, finish: str | None) -> Piece:
        self.finish = finish
        if finish is not None:
            self.clock.end(finish)
        logprobs, self._logprobs = self._logprobs, []
        return Piece(self.index, text, logprobs, finish)


class Run:
    """The answers to one question. Whoever begins one closes it, whatever happens: that frees its places and its adapter.

    Args:
        worker: of the engine.
        choices: one for each answer.
        left: seconds after which it is given up.
        freed: called once, when the engine has let go of all of it.
    """

    def __init__(self, worker: Worker, choices: list[Choice], left: float, freed: Callable[[], None]) -> None:
        self.worker, self.choices = worker, choices
        self._freed: Callable[[], None] | None = freed
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._streams: list[Stream] = []
        self._inside = 0
        self._closed = False
        self._deadline = asyncio.get_running_loop().call_later(left, self._events.put_nowait, None)

    @property
    def tokens(self) -> int:
        """Made so far, over all answers."""
        return sum(c.tokens for c in self.choices)

    async def submit(self, requests: list[Request]) -> None:
        """Put the requests into the engine.

        Raises:
            UserError: one can never be answered.
        """
        self._inside = len(requests)
        self._streams = await self.worker.submit(requests, [self._sink(i) for i in range(len(requests))])

    def _sink(self, index: int) -> Sink:
        def sink(event: Event) -> None:
            self._events.put_nowait((index, event))
            if isinstance(event, Ended):
                self._inside -= 1
                self._free_if_done()

        return sink

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answers, as they come.

        Raises:
            ApiError: the deadline has passed, or the engine failed.
        """
        left = len(self.choices)
        while left:
            event = await self._events.get()
            if event is None:
                raise too_late()
            choice = self.choices[event[0]]
            piece = choice.take(event[1])
            if piece is None:
                continue
            if piece.finish is not None:
                left -= 1
                if not isinstance(event[1], Ended):  # a stop text, of which the engine knows nothing
                    self.worker.cancel(self._streams[choice.index])
            yield piece

    def close(self) -> None:
        """Cancel what is not done. More than one call does no harm."""
        if self._closed:
            return
        self._closed = True
        self._deadline.cancel()
        for stream in self._streams:
            self.worker.cancel(stream)
        for choice in self.choices:
            if choice.finish is None:
                choice.clock.end("abort")
        self._free_if_done()

    def _free_if_done(self) -> None:
        if self._closed and not self._inside and self._freed is not None:
            freed, self._freed = self._freed, None
            freed()
