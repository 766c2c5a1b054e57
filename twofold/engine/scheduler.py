"""Continuous batching: streams come and go between forward passes, each with adapters of its own.

A pass takes in the newest token of every running stream, and beside them a chunk of the prompts that are still being read, so
that a long prompt delays nobody by more than a chunk. Everything happens in `step`, on the caller's thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from twofold.base.blocks import Decoder, describe
from twofold.engine.cache import WORTH_A_COPY
from twofold.engine.decoder import BlockForward
from twofold.engine.loading import Loads
from twofold.engine.plain import PlainForward
from twofold.engine.request import Request, TokenLogprobs
from twofold.engine.resident import Resident
from twofold.engine.sampler import Choice, Sampler, choose
from twofold.engine.step import Forward, Part, Worn
from twofold.engine.weights import Weights
from twofold.errors import ConfigError, did_you_mean
from twofold.events import Pieces, finished

CHUNK = 512
"""Prompt tokens that one pass takes in, at most."""


class Made(NamedTuple):
    """A stream has one more token."""

    stream: int
    token: int
    logprobs: TokenLogprobs | None


class Ended(NamedTuple):
    """A stream makes no more tokens. `form` says of an error that it lies in the form which the request asked for."""

    stream: int
    reason: Literal["stop", "length", "cancelled", "error"]
    message: str | None = None
    form: bool = False


@dataclass
class _Stream:
    """A request under way: its slot once it has one, and the tokens that are not in the cache yet."""

    number: int
    request: Request
    worn: Worn
    sampler: Sampler
    left: list[int]
    slot: int = -1
    held: int = 0
    made: int = 0
    cancelled: bool = False

    @property
    def reading(self) -> bool:
        """Whether its prompt is not all in the cache yet."""
        return self.made == 0


@dataclass
class _Pool:
    """The adapters that requests may name."""

    residents: dict[str, Resident] = field(default_factory=dict)

    def worn(self, request: Request) -> Worn:
        for key in request.adapters:
            if key not in self.residents:
                raise ConfigError(f"no adapter '{key}' is loaded{did_you_mean(key, list(self.residents))}")
        return tuple((self.residents[key], float(weight)) for key, weight in sorted(request.adapters.items()) if weight)


def forward_of(
    model: Any, streams: int, capacity: int, *, reuse: bool, native: bool, weights: Weights, merge_after: int | None
) -> Forward:
    """The fastest forward pass that is right for this model.

    Raises:
        ConfigError: the weights are wanted in eight bits, of a model that only its own forward can run, or with adapters merged; or
            these without our own kernels.
    """
    described = describe(model)
    if isinstance(described, Decoder):
        return BlockForward(
            model, described, streams, capacity, reuse=reuse, native=native, weights=weights, merge_after=merge_after
        )
    if weights == "int8":
        raise ConfigError(
            f"this model runs by its own forward ({described.reason}), which has no weights in eight bits; serve it as it is, or "
            "pack its linear layers when it is loaded (quantization: int8)"
        )
    if merge_after is not None:
        raise ConfigError(
            f"this model runs by its own forward ({described.reason}), which merges no adapters; leave out merge_after"
        )
    return PlainForward(model, streams, capacity, described.reason)


class Scheduler:
    """Serves requests over one base, each with adapters of its own or none.

    Attributes:
        admitted: the streams that the last step gave a slot.
        passes: forward passes that have come to their end.

    Args:
        model: a transformers causal language model; adapters that are active on it now are part of the base.
        streams: requests that run side by side.
        capacity: tokens that one stream may have, prompt and answer together.
        chunk: prompt tokens that one pass takes in.
        reuse: whether prompts go on from what slots hold already.
        native: False leaves our own kernels aside.
        weights: how a described decoder's weights are held; any but `shared` takes the model's own parameters, whose values are
            then unpacked wherever they are asked for.
        merge_after: passes in a row with the same adapters after which our own kernels fold these into a second copy of the weights
            (engine/merged.py), which their traffic then runs over; what is said changes by the rounding of that copy. None: never.
    """

    def __init__(
        self,
        model: Any,
        *,
        streams: int = 32,
        capacity: int = 2048,
        chunk: int = CHUNK,
        reuse: bool = True,
        native: bool = True,
        weights: Weights = "shared",
        merge_after: int | None = None,
    ) -> None:
        self._forward = forward_of(
            model, streams, capacity, reuse=reuse, native=native, weights=weights, merge_after=merge_after
        )
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._pool, self._chunk = _Pool(), chunk
        self._waiting: deque[_Stream] = deque()
        self._running: list[_Stream] = []
        self._loads = Loads()
        self._next = 0
        self.admitted: list[int] = []
        self.passes = 0

    @property
    def path(self) -> str:
        """Which operations run, and why."""
        return self._forward.path

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that are folded into a second copy of the weights."""
        return self._forward.merged

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def loading(self) -> bool:
        """Whether adapters are being read; each step brings them on, even one that fails."""
        return bool(self._loads)

    @property
    def slots(self) -> int:
        return self._forward.slots.count

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running and not self.loading

    @property
    def cache_used(self) -> float:
        """The share of the places for tokens that are filled."""
        return self._forward.slots.used

    def put_adapter(self, key: str, folder: Path) -> None:
        """Read an adapter and make it ready to be named.

        Raises:
            AdapterFileError: it does not fit.
            ConfigError: the key is taken.
        """
        self._check_new(key)
        self._pool.residents[key] = finished(self._forward.reading(key, folder))

    def load_adapter(self, key: str, folder: Path, done: Callable[[Exception | None], None]) -> None:
        """As `put_adapter`, a few milliseconds before each of the next passes; `done` is told of the end, and why it failed."""

        def settle(resident: Resident | None, error: Exception | None) -> None:
            if resident is not None:
                self._pool.residents[key] = resident
            done(error)

        self._loads.add(self._reading(key, folder), settle)

    def finish_loads(self) -> None:
        """Read what is on its way to the end."""
        self._loads.go_on(math.inf)

    def _reading(self, key: str, folder: Path) -> Pieces[Resident]:
        self._check_new(key)
        return (yield from self._forward.reading(key, folder))

    def _check_new(self, key: str) -> None:
        if key in self._pool.residents:
            raise ConfigError(f"an adapter '{key}' is loaded already")

    def adapter_bytes(self, key: str) -> int:
        """What a loaded adapter takes of memory: its factors, and what the operations keep beside them."""
        return self._forward.bytes_of(self._pool.residents[key])

    def drop_adapter(self, key: str) -> None:
        """Forget an adapter and free its memory.

        Raises:
            ConfigError: it is not there, or streams use it.
        """
        if key not in self._pool.residents:
            raise ConfigError(f"no adapter '{key}' is loaded{did_you_mean(key, list(self._pool.residents))}")
        if users := self.users(key):
            raise ConfigError(f"adapter '{key}' is used by {users} streams; let them end first")
        self._forward.drop(self._pool.residents.pop(key))
        self._forward.slots.forget(key)

    def users(self, key: str) -> int:
        """Streams, waiting or running, that use an adapter."""
        resident = self._pool.residents.get(key)
        return sum(1 for s in (*self._waiting, *self._running) if any(r is resident for r, _ in s.worn))

    def add(self, request: Request) -> int:
        """Take a request in; it waits until a slot is free. Returns the stream's number.

        Raises:
            ConfigError: it can never fit, or an adapter is not loaded or cannot be had so.
        """
        needed = len(request.token_ids) + request.max_new_tokens
        if needed > self._forward.slots.capacity:
            raise ConfigError(
                f"the prompt's {len(request.token_ids)} tokens and {request.max_new_tokens} new ones are more than the "
                f"{self._forward.slots.capacity} that a stream may have; ask for fewer"
            )
        request.check_vocabulary(self._vocabulary)
        self._next += 1
        worn = self._pool.worn(request)
        self._forward.check(worn)
        self._waiting.append(_Stream(self._next, request, worn, Sampler(request), list(request.token_ids)))
        return self._next

    def cancel(self, stream: int) -> None:
        """End a stream at the next step; one that has ended already is let be."""
        for one in (*self._waiting, *self._running):
            if one.number == stream:
                one.cancelled = True

    def step(self) -> list[Made | Ended]:
        """One forward pass, and what it made; before it, a few milliseconds of reading adapters."""
        self._loads.go_on()
        events: list[Made | Ended] = self._drop_cancelled()
        self._admit()
        batch = self._batch()
        if not batch:
            return events
        parts = [part for _, part in batch]
        logits = self._forward.run(parts)
        self.passes += 1
        for stream, part in batch:
            stream.held += len(part.tokens)
            del stream.left[: len(part.tokens)]
        asked = [stream for stream, part in batch if part.asked]
        choices = choose(logits, [s.sampler for s in asked]) if asked else []
        for stream, choice in zip(asked, choices, strict=True):
            events += self._take(stream, cast(Choice, choice))
        return events

    def _drop_cancelled(self) -> list[Made | Ended]:
        dropped = [s for s in (*self._waiting, *self._running) if s.cancelled]
        for stream in dropped:
            if stream.slot < 0:
                self._waiting.remove(stream)
            else:
                self._leave(stream)
        return [Ended(s.number, "cancelled") for s in dropped]

    def _admit(self) -> None:
        self.admitted, alike = [], deque[_Stream]()
        while self._waiting and self._forward.slots.free:
            stream = self._waiting.popleft()
            if self._is_being_read(stream):
                alike.append(stream)
                continue
            wearer = tuple((r.key, weight) for r, weight in stream.worn)
            stream.slot, stream.held = self._forward.slots.take(stream.left, wearer)
            del stream.left[: stream.held]
            self._running.append(stream)
            self.admitted.append(stream.number)
        self._waiting = alike + self._waiting

    def _is_being_read(self, stream: _Stream) -> bool:
        """Whether another is just reading the same long prompt, so that soon its keys and values need only be copied."""
        same = (stream.request.token_ids, stream.worn)
        return (
            self._forward.slots.reuse
            and len(stream.left) > WORTH_A_COPY
            and any(s.reading and (s.request.token_ids, s.worn) == same for s in self._running)
        )

    def _batch(self) -> list[tuple[_Stream, Part]]:
        """The running streams' newest tokens by their slots, then the prompts' next chunks, the shortest first."""
        decoding = sorted((s for s in self._running if not s.reading), key=lambda s: s.slot)
        chosen, room = [(s, s.left) for s in decoding], self._chunk
        for stream in (s for s in self._running if s.reading):
            if tokens := stream.left[:room]:
                chosen.append((stream, tokens))
                room -= len(tokens)
        chosen.sort(key=lambda c: len(c[1]))
        return [
            (s, Part(s.slot, s.held, list(tokens), s.worn, asked=len(tokens) == len(s.left))) for s, tokens in chosen
        ]

    def _take(self, stream: _Stream, choice: Choice) -> list[Made | Ended]:
        """A stream's next token, and its end if that was the last one."""
        request = stream.request
        if stream.sampler.error:
            self._leave(stream)
            return [Ended(stream.number, "error", stream.sampler.error, form=stream.sampler.failed is None)]
        stream.made += 1
        if choice.token in request.stop_ids:
            self._leave(stream)
            return [Ended(stream.number, "stop")]
        stream.left.append(choice.token)
        made = Made(stream.number, choice.token, choice.logprobs)
        if stream.sampler.finished or stream.made >= request.max_new_tokens:
            self._leave(stream)
            return [made, Ended(stream.number, "stop" if stream.sampler.finished else "length")]
        return [made]

    def _leave(self, stream: _Stream) -> None:
        self._forward.slots.give_back(stream.slot)
        self._running.remove(stream)
