"""What the routes share: the engine, the adapters and the queue in front of them, and how a question begins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from twofold.base.chat import Renderer
from twofold.base.load import Base
from twofold.engine.grammar import Grammar, Grammars
from twofold.engine.request import Request
from twofold.engine.scheduler import Scheduler
from twofold.recipes.serve import ServeConfig, Served
from twofold.server.answering import Admission, Choice, Run, too_late
from twofold.server.asking import engine_requests, form_of, most_tokens
from twofold.server.ending import OpenRequests
from twofold.server.errors import ApiError
from twofold.server.layout import Limits
from twofold.server.memory import Generation
from twofold.server.metrics import Metrics
from twofold.server.openai import Asking
from twofold.server.registry import Registry, RegistryConfig
from twofold.server.tools import stop_texts
from twofold.server.worker import EngineThread, Worker

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the two kinds of requests say in different words.

    Attributes:
        prompts: of a request, by the renderer of its model.
        count: how many prompts there will be.
        max_tokens: the most tokens of an answer, if it says.
        most: the tokens of an answer if it does not; None: as many as fit.
        logprobs: how many likeliest tokens to report; None: no report.
    """

    prompts: Callable[[Renderer], list[list[int]]]
    count: int
    max_tokens: int | None
    most: int | None
    logprobs: int | None


@dataclass(frozen=True)
class Begun:
    """A question that the engine has taken: its answers, the tokens of its prompts, and what answers."""

    run: Run
    prompt_tokens: int
    generation: str | None


class Service:
    """Everything behind the routes of one server; made before its event loop, started inside it."""

    def __init__(self, served: Served, config: ServeConfig, thread: EngineThread) -> None:
        self.base: Base = served.base
        self.config = config
        self.context = served.context
        self.encoder = served.encoder
        self.vocabulary: int = served.base.model.get_input_embeddings().num_embeddings
        self.started = int(time.time())
        scheduler: Scheduler = served.scheduler
        self.worker = Worker(scheduler, thread)
        self.requests = OpenRequests()
        self.admission = Admission(scheduler.slots, config.max_queued)
        self.metrics = Metrics(served.names[0])
        limits = Limits(int(config.max_adapter_mb * 1e6), config.max_rank)
        self.registry = Registry(
            RegistryConfig(
                root=config.adapters,
                limits=limits,
                budget_bytes=int(config.adapter_memory_mb * 1e6),
                allow_foreign=config.allow_foreign_base,
            ),
            self.base,
            served.names,
            self.worker,
        )
        self.metrics.watch(self.worker, self.registry)
        self.registry.gone = self.metrics.forget
        self._texts = ThreadPoolExecutor(max_workers=1, thread_name_prefix="texts")  # tokenizers are not for several
        self._forms = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forms")
        self._grammars: dict[tuple[int, ...], Grammars] = {}
        self._watching: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Begin the engine's thread, look at the adapter folder, and go on watching it."""
        self.worker.start()
        await self.registry.refresh()
        self._watching = asyncio.create_task(self.registry.watch(self.config.poll_seconds))

    async def stop(self) -> None:
        """End everything; answers that are not done are cut off."""
        self.admission.draining = True
        if self._watching is not None:
            self._watching.cancel()
        await self.worker.stop()
        for threads in (self._texts, self._forms):
            threads.shutdown(wait=False, cancel_futures=True)

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.worker.healthy and not self.admission.draining

    # ------------------------------------------------------------------------------------------ questions

    async def begin(self, request: Asking, wanted: Wanted) -> Begun:
        """Put a question into the engine; `close` its run, whatever happens.

        Raises:
            ApiError: an unknown model, a full queue, a prompt that is too long, an adapter that cannot be served.
            UserError: messages or a form that cannot be used.
        """
        adapter = self.registry.adapter_of(request.model)
        count = wanted.count * request.n
        self.admission.enter(count)
        start, generation, run = time.monotonic(), None, None

        def freed() -> None:
            self.admission.leave(count, time.monotonic() - start)
            if generation is not None:
                self.registry.release(generation)

        try:
            async with asyncio.timeout(self.config.deadline_seconds):
                generation = None if adapter is None else await self.registry.acquire(adapter)
                asked = await self._asked(request, wanted, generation)
                left = self.config.deadline_seconds - (time.monotonic() - start)
                run = Run(self.worker, self._choices(request, len(asked), adapter, start), left, freed)
                await run.submit(asked)
        except BaseException as error:
            run.close() if run is not None else freed()
            if isinstance(error, TimeoutError):
                raise too_late() from error
            raise
        tokens = sum(len(one.token_ids) for one in asked[:: request.n])
        self.metrics.prompt(adapter, tokens)
        return Begun(run, tokens, generation.called(adapter) if generation and adapter else None)

    async def _asked(self, request: Asking, wanted: Wanted, generation: Generation | None) -> list[Request]:
        """What the engine is asked: `n` requests for each prompt."""
        if generation is None and request.adapter_scale != 1:
            said = f"adapter_scale is for adapters, but {request.model!r} is the base; leave it out"
            raise ApiError(400, said, param="adapter_scale")
        renderer = generation.renderer if generation else self.base.renderer
        adapters = {} if generation is None else {generation.key: request.adapter_scale}
        grammar = await self._grammar(request, renderer)

        def requests() -> list[Request]:
            prompts = wanted.prompts(renderer)
            if not all(prompts):
                raise ApiError(400, "a prompt needs at least one token", param="prompt")
            tokens = most_tokens(wanted.max_tokens, prompts, self.context, wanted.most)
            asked = engine_requests(request, prompts, tokens, renderer, adapters, grammar, wanted.logprobs)
            for one in asked:
                one.check_vocabulary(self.vocabulary)
            return asked

        return await self.in_text_thread(requests)

    async def _grammar(self, request: Asking, renderer: Renderer) -> Grammar | None:
        """The form of the answer, compiled in a thread of its own, since others' texts do not wait for that."""
        form = form_of(request)
        if form is None:
            return None
        grammars = await self.in_text_thread(lambda: self._grammars_of(renderer))
        return await asyncio.get_running_loop().run_in_executor(self._forms, form.grammar, grammars)

    def _grammars_of(self, renderer: Renderer) -> Grammars:
        ends = tuple(renderer.end_token_ids)
        if ends not in self._grammars:
            self._grammars[ends] = Grammars(self.base.tokenizer, ends)
        return self._grammars[ends]

    def _choices(self, request: Asking, count: int, adapter: str | None, start: float) -> list[Choice]:
        clocks = [self.metrics.clock(adapter, start) for _ in range(count)]
        stops = stop_texts(request)
        return [Choice(i, self.base.tokenizer, stops, clock) for i, clock in enumerate(clocks)]

    async def in_text_thread(self, work: Callable[[], T]) -> T:
        """Do something with a tokenizer, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, work)
