"""`POST /v1/embeddings`, of the encoder beside the base."""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field

from twofold.engine.encoder import Encoder
from twofold.errors import nearest
from twofold.server.answering import too_late
from twofold.server.connection import while_connected
from twofold.server.errors import ApiError
from twofold.server.openai import Body, Name, TokenIds
from twofold.server.service import Service

MOST_TEXTS = 2048
"""OpenAI's own limit."""
TOGETHER = 512
"""Tokens that the encoder takes between two steps of the engine, or one text."""


class EmbeddingRequest(Body):
    """OpenAI's `POST /v1/embeddings`."""

    model: Name
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_TEXTS)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class Embedding(BaseModel):
    """A text's vector: numbers, or their bytes as little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """All vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def add_embeddings(app: FastAPI, service: Service) -> None:
    """The route; without an encoder it says how to get one."""

    @app.post("/v1/embeddings")
    async def embeddings(asked: EmbeddingRequest, http: Request) -> EmbeddingList:
        """Texts as vectors of length 1."""
        encoder = _encoder(service, asked)
        service.admission.enter(1)
        begun = time.monotonic()
        try:
            async with asyncio.timeout(service.config.deadline_seconds):
                return await while_connected(http, _embedded(service, encoder, asked))
        except TimeoutError as error:
            raise too_late() from error
        finally:
            service.admission.leave(1, time.monotonic() - begun)


def _encoder(service: Service, asked: EmbeddingRequest) -> Encoder:
    encoder = service.encoder
    if encoder is None:
        raise ApiError(400, "this server has no encoder; start it with --embeddings", code="no_encoder", param="model")
    if asked.model != encoder.name:
        hint = f"; did you mean {encoder.name!r}?" if nearest(asked.model, [encoder.name]) else ""
        said = f"no encoder {asked.model[:200]!r} here, but {encoder.name!r}{hint}"
        raise ApiError(404, said, code="model_not_found", param="model")
    if asked.dimensions not in (None, encoder.width):
        raise ApiError(400, f"{encoder.name!r} gives {encoder.width} dimensions and no fewer", param="dimensions")
    return encoder


async def _embedded(service: Service, encoder: Encoder, asked: EmbeddingRequest) -> EmbeddingList:
    texts = await service.in_text_thread(lambda: _tokens(encoder, asked))
    vectors: list[list[float]] = []
    for some in _together(texts):
        vectors += await service.worker.call(lambda _, some=some: encoder.embed(some).tolist())  # type: ignore[misc]
    count = sum(map(len, texts))
    data = [Embedding(index=i, embedding=_encoded(v, asked.encoding_format)) for i, v in enumerate(vectors)]
    return EmbeddingList(data=data, model=encoder.name, usage=EmbeddingUsage(prompt_tokens=count, total_tokens=count))


def _together(texts: list[list[int]]) -> Iterator[list[list[int]]]:
    """The texts in their order, as many at a time as take so many tokens when they are filled up to the longest of them."""
    some: list[list[int]] = []
    for text in texts:
        if some and (len(some) + 1) * max(map(len, (*some, text))) > TOGETHER:
            yield some
            some = []
        some.append(text)
    yield some


def _tokens(encoder: Encoder, asked: EmbeddingRequest) -> list[list[int]]:
    given: Any = asked.input
    many = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    texts = [encoder.tokens(t) if isinstance(t, str) else list(t) for t in many]
    for i, text in enumerate(texts):
        if not 0 < len(text) <= encoder.longest:
            raise ApiError(
                400, f"text {i} has {len(text)} tokens, but there may be 1 to {encoder.longest}", param="input"
            )
        if max(text) >= encoder.model.config.vocab_size:
            raise ApiError(400, f"text {i} has a token that the encoder does not know", param="input")
    return texts


def _encoded(vector: list[float], form: str) -> list[float] | str:
    if form == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
