"""Plain generation: requests in, completions out, many streams at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from twofold.engine.model import stream_model
from twofold.engine.request import Completion, Request, TokenLogprobs
from twofold.engine.sampler import Choice, Sampler, choose
from twofold.events import Emit, Progress, silent


@dataclass
class _Stream:
    index: int
    request: Request
    sampler: Sampler
    made: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Engine:
    """Generates with a model as it stands: base, active adapters, or merged.

    Args:
        model: a transformers causal language model.
        streams: requests that run side by side.
    """

    def __init__(self, model: Any, streams: int = 32) -> None:
        self.model, self.streams = model, streams

    def generate(self, requests: Sequence[Request], emit: Emit = silent, task: str = "generating") -> list[Completion]:
        """Answer all requests; the answers come in the order of the requests and do not depend on one another."""
        answers: dict[int, Completion] = {}
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].token_ids))
        for start in range(0, len(order), self.streams):
            chosen = order[start : start + self.streams]
            for index, answer in self._together([(i, requests[i]) for i in chosen]):
                answers[index] = answer
                emit(Progress(task=task, done=len(answers), total=len(requests)))
        return [answers[i] for i in range(len(requests))]

    def stream(self, request: Request) -> Iterator[int]:
        """The tokens of one answer, as they are made."""
        model, sampler = stream_model(self.model), Sampler(request)
        logits = model.start([request.token_ids], len(request.token_ids) + request.max_new_tokens)
        for made in range(request.max_new_tokens):
            for choice in choose(logits, [sampler]):
                if choice is None or _stops(request, choice.token):
                    return
                yield choice.token
                if made + 1 < request.max_new_tokens:
                    logits = model.step([choice.token])

    def _together(self, requests: Sequence[tuple[int, Request]]) -> Iterator[tuple[int, Completion]]:
        """One batch of streams. Done ones ride along until half are done: then they are dropped, all at once, because a
        batch of a new size makes the CPU's kernels prepare again."""
        model = stream_model(self.model)
        slots: list[_Stream | None] = [_Stream(i, r, Sampler(r)) for i, r in requests]
        capacity = max(len(r.token_ids) + r.max_new_tokens for _, r in requests)
        logits = model.start([r.token_ids for _, r in requests], capacity)
        while True:
            choices = choose(logits, [s.sampler if s else None for s in slots])
            for place, (stream, choice) in enumerate(zip(slots, choices, strict=True)):
                answer = _advance(stream, choice) if stream and choice else None
                if stream and answer:
                    slots[place] = None
                    yield stream.index, answer
            going = [p for p, s in enumerate(slots) if s is not None]
            if not going:
                return
            if 2 * len(going) <= len(slots):
                model.keep(going)
                slots, choices = [slots[p] for p in going], [choices[p] for p in going]
            logits = model.step([c.token if c else 0 for c in choices])


def _advance(stream: _Stream, choice: Choice) -> Completion | None:
    """Take a token in; the completion if that ended it."""
    request, stops = stream.request, _stops(stream.request, choice.token)
    if not stops:
        stream.made.append(choice.token)
        stream.logprobs += [choice.logprobs] if choice.logprobs else []
    if not stops and len(stream.made) < request.max_new_tokens:
        return None
    logprobs = None if request.sampling.logprobs is None else stream.logprobs
    return Completion(token_ids=stream.made, finish_reason="stop" if stops else "length", logprobs=logprobs)


def _stops(request: Request, token: int) -> bool:
    return token in request.stop_ids and not request.ignore_stop
