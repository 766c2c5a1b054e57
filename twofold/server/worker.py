"""The engine's one thread: commands go in by a queue, events come out on the event loop.

The thread alone touches the scheduler. It takes commands between two steps; what a step made is handed to the event loop
in one call, however many streams there are. An exception in a step ends the streams it may have touched, never the thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from twofold.engine.request import Request
from twofold.engine.scheduler import Ended, Made, Scheduler
from twofold.server.errors import draining

T = TypeVar("T")


class Admitted(NamedTuple):
    """A request no longer waits: the engine began with it at this time of `time.monotonic`."""

    at: float


Event = Admitted | Made | Ended
Sink = Callable[[Event], None]
GIVEN_WAY = 0.004
"""Seconds."""
FAILURES = 3
"""So many failed steps in a row, and the engine no longer counts as healthy."""
log = logging.getLogger("twofold.server")


class Stream:
    """One request inside the engine. `sink` gets its events on the event loop, an `Ended` last and once."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.id: int | None = None
        self.cancelled = False
        self.over = False

    def deliver(self, event: Event) -> None:
        if not self.over:
            self.over = isinstance(event, Ended)
            self.sink(event)


class EngineThread:
    """The one thread that computes, from loading the base on.

    OpenMP keeps helpers for every thread that ever asked for some, and lets them sleep between two loops once there are more of
    them than cores; a step has hundreds of loops. So no other thread may compute.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Do something in this thread, after what was submitted before."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._work.put(run)
        return future

    def _run(self) -> None:
        while True:
            self._work.get()()


class Worker:
    """Runs a scheduler in the engine's thread; its methods belong to the event loop.

    Attributes:
        failures: steps that failed since the last forward pass that did not.
    """

    def __init__(self, scheduler: Scheduler, thread: EngineThread) -> None:
        self.scheduler = scheduler
        self.failures = 0
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = thread
        self._done: Future[None] | None = None

    # ------------------------------------------------------------------------------------------ the event loop's side

    def start(self) -> None:
        """Begin, from inside the event loop that will get the events."""
        gc.collect()
        gc.freeze()  # what is loaded by now stays: looking through all of it again takes a quarter of a second
        self._loop = asyncio.get_running_loop()
        self._done = self._thread.submit(self._run)

    @property
    def healthy(self) -> bool:
        return self._done is not None and not self._done.done() and self.failures < FAILURES

    async def call(self, work: Callable[[Scheduler], T]) -> T:
        """Do something with the scheduler between two steps, and wait for it."""
        if self._stopping or self._loop is None:
            raise draining()
        loop, future = self._loop, self._loop.create_future()

        def command() -> None:
            try:
                found = work(self.scheduler)
            except BaseException as error:
                self._tell(loop, _settle, future, None, error)
            else:
                self._tell(loop, _settle, future, found, None)

        self._commands.put(command)
        result: T = await future
        return result

    async def load(self, key: str, folder: Path) -> int:
        """Have the scheduler read an adapter, piece by piece between its steps, and wait for it; the bytes that it takes."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def done(error: Exception | None) -> None:
            found = None if error else self.scheduler.adapter_bytes(key)
            self._tell(loop, _settle, future, found, error)

        await self.call(lambda scheduler: scheduler.load_adapter(key, folder, done))
        held: int = await future
        return held

    def give_way(self) -> None:
        """Called by other threads every millisecond or so of work: they leave the cores to a pass that is under way."""
        if self.scheduler.running:
            time.sleep(GIVEN_WAY)

    async def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Stream]:
        """Put requests into the engine, all between the same two steps. Whatever happens, each sink hears an end.

        Raises:
            UserError: one can never be answered, and so none is.
        """
        streams = [Stream(sink) for sink in sinks]
        try:
            await self.call(lambda scheduler: self._add(scheduler, streams, requests))
        except BaseException:
            for stream in streams:
                self.cancel(stream)
            raise
        return streams

    def cancel(self, stream: Stream) -> None:
        """End a stream; its sink hears so when it has happened."""
        if not stream.over and not stream.cancelled:
            stream.cancelled = True
            self._commands.put(lambda: self._cancel(stream))

    async def stop(self) -> None:
        """End the thread after the step it is in; streams that are not done end as cancelled."""
        self._stopping = True
        self._commands.put(lambda: None)
        if self._done is not None:
            await asyncio.wrap_future(self._done)

    # ------------------------------------------------------------------------------------------ the thread's side

    def _run(self) -> None:
        while not self._stopping:
            self._take_commands()
            if not self._stopping and not self.scheduler.idle:
                self._step()
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()
        self.scheduler.finish_loads()
        self._end_all("cancelled", "the server is shutting down")

    def _take_commands(self) -> None:
        """Run what waits; wait for something where there is nothing else to do."""
        failing = self.failures >= FAILURES and not self.scheduler.loading
        if self.scheduler.idle or failing:
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _step(self) -> None:
        now, passes = time.monotonic(), self.scheduler.passes
        try:
            events = self.scheduler.step()
        except Exception:
            self.failures += 1
            log.exception("a step of the engine failed")
            self._end_all("error", "the engine failed at this request's step; its log has the reason")
            return
        if self.scheduler.passes > passes:
            self.failures = 0
        begun = [self._streams[n] for n in self.scheduler.admitted if n in self._streams]
        batch: list[tuple[Stream, Event]] = [(stream, Admitted(now)) for stream in begun]
        batch += [(self._streams[e.stream], e) for e in events if e.stream in self._streams]
        for event in events:
            if isinstance(event, Ended):
                self._streams.pop(event.stream, None)
        if batch:
            self._tell(self._loop, _deliver, batch)

    def _add(self, scheduler: Scheduler, streams: Sequence[Stream], requests: Sequence[Request]) -> None:
        for stream, request in zip(streams, requests, strict=True):
            if not stream.cancelled:
                stream.id = scheduler.add(request)
                self._streams[stream.id] = stream

    def _cancel(self, stream: Stream) -> None:
        if stream.id is None:
            self._tell(self._loop, stream.deliver, Ended(-1, "cancelled"))
        elif stream.id in self._streams:
            self.scheduler.cancel(stream.id)

    def _end_all(self, reason: Literal["error", "cancelled"], message: str) -> None:
        """End every stream; the scheduler is told, but not trusted to say so."""
        streams, self._streams = self._streams, {}
        for number in streams:
            with contextlib.suppress(Exception):
                self.scheduler.cancel(number)
        ended = Ended(-1, reason, message)
        self._tell(self._loop, _deliver, [(stream, ended) for stream in streams.values()])

    @staticmethod
    def _tell(loop: asyncio.AbstractEventLoop | None, what: Callable[..., None], *arguments: object) -> None:
        """Call on the event loop; one that is closed has nobody left to tell."""
        if loop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(what, *arguments)


def _deliver(batch: list[tuple[Stream, Event]]) -> None:
    for stream, event in batch:
        stream.deliver(event)


def _settle(future: asyncio.Future[T], found: T, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(found)
    elif isinstance(error, Exception):
        future.set_exception(error)
    else:
        future.set_exception(RuntimeError(f"the engine's thread was stopped: {type(error).__name__}"))
