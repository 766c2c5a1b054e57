"""The routes: thin, over the service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from twofold.errors import UserError
from twofold.recipes.serve import ServeConfig, Served
from twofold.server.access import AccessLog
from twofold.server.asking import chat_prompt, completion_prompts
from twofold.server.connection import Gone, while_connected
from twofold.server.embedding import add_embeddings
from twofold.server.ending import Ending
from twofold.server.errors import ApiError, ErrorBody, without_paths
from twofold.server.openai import (
    AdapterList,
    AdapterState,
    Asking,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Health,
    LoadAdapter,
    ModelCard,
    ModelList,
    UnloadAdapter,
)
from twofold.server.security import Gate, Policy, digest, plain_origin
from twofold.server.service import Begun, Service, Wanted
from twofold.server.wire import ChatWire, TextWire, events
from twofold.server.worker import EngineThread

_NOWHERE = Path("/\0")
SHORT = 16
"""Tokens of a completion that does not say how many: OpenAI's default."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 413, 429, 500, 503, 504)
}
TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def make_app(served: Served, config: ServeConfig, thread: EngineThread | None = None) -> FastAPI:
    """The application of one server; `app.state.service` is what it runs on.

    Args:
        thread: the one that loaded the base, or a new one.
    """
    service = Service(served, config, thread or EngineThread())

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="Twofold", lifespan=life, docs_url=None, redoc_url=None, responses=ERRORS)
    app.state.service = service
    _add_errors(app)
    _add_probes(app, service)
    _add_answers(app, service)
    add_embeddings(app, service)
    _add_models(app, service)
    _add_adapters(app, service)
    policy = policy_of(config)
    if policy.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(policy.origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Gate, policy=policy, max_body_bytes=int(config.max_body_mb * 1e6))
    app.add_middleware(Ending, requests=service.requests)
    app.add_middleware(AccessLog, metrics=service.metrics)
    return app


def policy_of(config: ServeConfig) -> Policy:
    """Who a server with this configuration lets in."""
    return Policy(
        hosts=frozenset(h.lower() for h in (*config.allowed_hosts, config.host)),
        origins=frozenset(map(plain_origin, config.allowed_origins)),
        keys=frozenset(map(digest, config.api_key)),
        admin_keys=frozenset(map(digest, config.admin_key)),
    )


# ---------------------------------------------------------------------------------------------- errors


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body().model_dump(), error.status, error.headers)

    @app.exception_handler(UserError)
    async def user(_: Request, error: UserError) -> Response:
        said = without_paths(str(error), app.state.service.config.adapters or _NOWHERE, "the adapter root")
        return await api(_, ApiError(400, said))

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> Response:
        return await api(_, _readable(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        lost = f"there is no {request.url.path[:200]} here; GET /openapi.json lists all routes"
        return await api(request, ApiError(error.status_code, lost if error.status_code == 404 else str(error.detail)))

    @app.exception_handler(Gone)
    async def gone(_: Request, __: Gone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def ours(_: Request, error: Exception) -> Response:
        return await api(_, ApiError(500, "the server failed at this request; its log has the reason"))


def _readable(error: RequestValidationError) -> ApiError:
    """The first few mistakes of a request in one sentence, each with its place; those at one place are alternatives."""
    found = error.errors()
    if found and found[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {found[0]['ctx']['error']}, at character {found[0]['loc'][-1]}")
    said: dict[str, dict[str, None]] = {}
    for e in found:
        said.setdefault(_place(e, error.body), {})[e["msg"].removeprefix("Value error, ")] = None
    sentences = [f"{place}: {' or '.join(reasons)}" for place, reasons in said.items()]
    return ApiError(400, "; ".join(sentences[:4]), param=next(iter(said), None))


def _place(error: Any, body: Any) -> str:
    """Where in the body a mistake is, without pydantic's names of the alternatives that were tried there."""
    parts: list[int | str] = []
    here = body
    for part in error["loc"][1:]:
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            parts, here = [*parts, part], here[part]
    missing = error["loc"][-1:] if error["type"] == "missing" else ()
    return ".".join(map(str, [*parts, *missing]))[:200] or "the body"


# ---------------------------------------------------------------------------------------------- answers


class EventStream(StreamingResponse):
    """Server-sent events that free what they hold, even if the client leaves before the first."""

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


async def _answer(
    service: Service, http: Request, asked: Asking, wanted: Wanted, wire_of: Callable[[Begun], ChatWire | TextWire]
) -> Any:
    """The answers to a question: a stream of events, or one object."""
    begun = await while_connected(http, service.begin(asked, wanted), lambda late: late.run.close())
    wire = wire_of(begun)
    logged = http.scope["twofold"] = {
        "model": asked.model,
        "generation": begun.generation,
        "prompt": begun.prompt_tokens,
    }

    def close() -> None:
        logged["made"] = begun.run.tokens
        begun.run.close()

    if asked.stream:
        return EventStream(events(wire), close)
    try:
        pieces = await while_connected(http, _collected(begun))
    finally:
        close()
    return wire.whole(pieces)


async def _collected(begun: Begun) -> list[Any]:
    return [piece async for piece in begun.run.pieces()]


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(asked: ChatRequest, http: Request) -> Any:
        """The next answer in a conversation."""
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        wanted = Wanted(
            prompts=lambda renderer: [chat_prompt(asked, renderer, service.context)],
            count=1,
            max_tokens=asked.max_completion_tokens or asked.max_tokens,
            most=service.config.default_tokens,
            logprobs=logprobs,
        )
        return await _answer(service, http, asked, wanted, lambda b: ChatWire(asked, b, service.base.tokenizer))

    @app.post("/v1/completions", response_model=Completion)
    async def completions(asked: CompletionRequest, http: Request) -> Any:
        """Continuations of prompts."""
        wanted = Wanted(
            prompts=lambda renderer: completion_prompts(asked, renderer),
            count=len(asked.prompts),
            max_tokens=asked.max_tokens,
            most=SHORT,
            logprobs=asked.logprobs,
        )
        return await _answer(service, http, asked, wanted, lambda b: TextWire(asked, b, service.base.tokenizer))


# ---------------------------------------------------------------------------------------------- models


def _add_models(app: FastAPI, service: Service) -> None:
    registry = service.registry
    base = registry.base_names[0]

    encoders = () if service.encoder is None else (service.encoder.name,)

    def card(name: str) -> ModelCard:
        if name in encoders:
            return ModelCard(id=name, created=service.started, root=name)
        adapter = registry.adapter_of(name)
        if adapter is None:
            return ModelCard(id=name, created=service.started, root=base)
        generation = registry.generation_of(adapter)
        called = generation.called(adapter) if generation else None
        return ModelCard(id=name, created=service.started, root=adapter, parent=base, generation=called)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The base and all adapters, in memory or not."""
        return ModelList(data=[card(name) for name in (*registry.base_names, *encoders, *registry.names())])

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        """One of them; 404 with the nearest names for any other."""
        return card(model)


def _add_adapters(app: FastAPI, service: Service) -> None:
    registry = service.registry

    @app.post("/v1/load_lora_adapter", response_model=None, responses=TEXT)
    async def load_lora_adapter(asked: LoadAdapter) -> PlainTextResponse:
        """Serve an adapter below the root under a name, from memory from now on."""
        await registry.load(asked.lora_name, asked.lora_path, in_place=asked.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", response_model=None, responses=TEXT)
    async def unload_lora_adapter(asked: UnloadAdapter) -> PlainTextResponse:
        """Serve an adapter no longer, and free its memory."""
        await registry.unload(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    @app.get("/v1/lora_adapters")
    async def lora_adapters() -> AdapterList:
        """All adapters: which generation is in memory, how many requests use it, and why one was refused."""
        return AdapterList(data=[state(name) for name in registry.names()])

    def state(name: str) -> AdapterState:
        found = registry.generation_of(name)
        return AdapterState(
            name=name,
            generation=found.called(name) if found else None,
            bytes=found.bytes if found else None,
            requests=found.leases if found else 0,
            refused=registry.refusal_of(name),
        )


# ---------------------------------------------------------------------------------------------- probes


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Health:
        """Whether the engine works."""
        if not service.worker.healthy:
            raise ApiError(503, "the engine has failed; start the server again", code="engine_failed")
        return Health(status="ok")

    @app.get("/ready")
    async def ready() -> Health:
        """Whether new requests are taken."""
        if not service.ready:
            raise ApiError(503, "the server takes no new requests", code="draining")
        return Health(status="ready")

    @app.get("/metrics", response_model=None, responses=TEXT)
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
