"""Plain generation: requests in, completions out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from twofold.engine.request import Completion, Request, cannot_go_on
from twofold.engine.scheduler import Ended, Made, Scheduler
from twofold.events import Emit, Progress, silent


class Engine:
    """Generates with a model as it stands: base, active adapters, or merged.

    Args:
        model: a transformers causal language model.
        streams: requests that run side by side.
    """

    def __init__(self, model: Any, streams: int = 32) -> None:
        self.model, self.streams = model, streams

    def generate(self, requests: Sequence[Request], emit: Emit = silent, task: str = "generating") -> list[Completion]:
        """Answer all requests; the answers come in the order of the requests and do not depend on one another.

        Raises:
            AnswerError: the model's numbers overflow, or a form grew too complex.
        """
        if not requests:
            return []
        scheduler = self._scheduler(requests)
        numbers = {scheduler.add(request): i for i, request in enumerate(requests)}
        made: list[list[Made]] = [[] for _ in requests]
        answers: dict[int, Completion] = {}
        while not scheduler.idle:
            for event in scheduler.step():
                at = numbers[event.stream]
                if isinstance(event, Made):
                    made[at].append(event)
                else:
                    _check(event)
                    logprobs = [m.logprobs for m in made[at] if m.logprobs is not None]
                    tokens = [m.token for m in made[at]]
                    answers[at] = Completion(token_ids=tokens, finish_reason=event.reason, logprobs=logprobs or None)
                    emit(Progress(task=task, done=len(answers), total=len(requests)))
        return [answers[i] for i in range(len(requests))]

    def stream(self, request: Request) -> Iterator[int]:
        """The tokens of one answer, as they are made.

        Raises:
            AnswerError: as `generate`.
        """
        scheduler = self._scheduler([request])
        scheduler.add(request)
        while not scheduler.idle:
            for event in scheduler.step():
                if isinstance(event, Made):
                    yield event.token
                else:
                    _check(event)

    def _scheduler(self, requests: Sequence[Request]) -> Scheduler:
        capacity = max(len(r.token_ids) + r.max_new_tokens for r in requests)
        return Scheduler(self.model, streams=min(self.streams, len(requests)), capacity=capacity)


def _check(end: Ended) -> None:
    if end.reason == "error":
        raise cannot_go_on(end.message, form=end.form)
