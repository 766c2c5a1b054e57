"""Answers as they go over the wire: OpenAI's objects, whole or as events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from twofold.engine.request import TokenLogprobs
from twofold.engine.text import Offsets, token_bytes
from twofold.server.answering import Piece
from twofold.server.errors import ApiError
from twofold.server.openai import (
    AnswerMessage,
    Asking,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    TextChoice,
    ToolCall,
    Usage,
)
from twofold.server.service import Begun
from twofold.server.tools import ToolParser

DONE = b"data: [DONE]\n\n"


class Wired:
    """What both ways share: the head of every object, and the counts."""

    prefix, object = "", ""

    def __init__(self, request: Asking, begun: Begun, tokenizer: Any) -> None:
        self.request, self.begun, self.tokenizer = request, begun, tokenizer
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": begun.generation,
        }

    def usage(self) -> Usage:
        made = self.begun.run.tokens
        prompt = self.begun.prompt_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)

    def token_bytes(self, token: int) -> bytes:
        return token_bytes(self.tokenizer, token)

    def token_text(self, token: int) -> str:
        """A token's text; of a part of a character its bytes, as OpenAI writes them, so that no two parts are called the same."""
        found = self.token_bytes(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    @property
    def counting(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        options = self.request.stream_options
        return options is not None and options.include_usage


# ---------------------------------------------------------------------------------------------- conversations


class ChatWire(Wired):
    """The answers to a `ChatRequest`."""

    prefix, object = "chatcmpl", "chat.completion.chunk"

    def __init__(self, request: ChatRequest, begun: Begun, tokenizer: Any) -> None:
        super().__init__(request, begun, tokenizer)
        self.with_logprobs = request.logprobs
        self.indices = range(len(begun.run.choices))
        self.parsers = (
            {i: ToolParser() for i in self.indices} if request.tools and request.tool_choice != "none" else {}
        )
        self.called = dict.fromkeys(self.indices, 0)

    def opening(self) -> Iterable[dict[str, Any]]:
        for i in self.indices:
            yield {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def choice(self, piece: Piece) -> dict[str, Any] | None:
        text, calls = self._parted(piece)
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            first = self.called[piece.choice] - len(calls)
            delta["tool_calls"] = [{"index": first + n, **call.model_dump()} for n, call in enumerate(calls)]
        if not delta and piece.finish is None and not piece.logprobs:
            return None
        choice = {"index": piece.choice, "delta": delta, "finish_reason": self._finish(piece)}
        return choice | ({"logprobs": self._logprobs(piece.logprobs)} if self.with_logprobs else {})

    def whole(self, pieces: list[Piece]) -> ChatCompletion:
        return ChatCompletion(**self.head, choices=[self._whole(i, pieces) for i in self.indices], usage=self.usage())

    def _whole(self, index: int, pieces: list[Piece]) -> ChatChoice:
        own = [p for p in pieces if p.choice == index]
        parted = [self._parted(p) for p in own]
        text, calls = "".join(t for t, _ in parted), [c for _, found in parted for c in found]
        logprobs = self._logprobs([one for p in own for one in p.logprobs]) if self.with_logprobs else None
        message = AnswerMessage(content=(text.strip() or None) if calls else text, tool_calls=calls or None)
        return ChatChoice(
            index=index, message=message, logprobs=logprobs, finish_reason=self._finish(own[-1]) or "stop"
        )

    def _parted(self, piece: Piece) -> tuple[str, list[ToolCall]]:
        """The text of a piece, and the calls that it completes."""
        parser = self.parsers.get(piece.choice)
        if parser is None:
            return piece.text, []
        text, calls = parser.put(piece.text)
        if piece.finish is not None:
            rest = parser.finish()
            text, calls = text + rest.text, calls + rest.calls
        self.called[piece.choice] += len(calls)
        return text, calls

    def _finish(self, piece: Piece) -> str | None:
        return "tool_calls" if piece.finish == "stop" and self.called[piece.choice] else piece.finish

    def _logprobs(self, found: list[TokenLogprobs]) -> dict[str, Any]:
        content = [
            {**self._token(t.token, t.logprob), "top_logprobs": [self._token(*likely) for likely in t.likeliest]}
            for t in found
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.token_text(token), "logprob": logprob, "bytes": list(self.token_bytes(token))}


# ---------------------------------------------------------------------------------------------- bare prompts


class TextWire(Wired):
    """The answers to a `CompletionRequest`."""

    prefix, object = "cmpl", "text_completion"

    def __init__(self, request: CompletionRequest, begun: Begun, tokenizer: Any) -> None:
        super().__init__(request, begun, tokenizer)
        self.with_logprobs = request.logprobs is not None
        self.prompts = request.prompts if request.echo else []
        self.indices = range(len(begun.run.choices))
        self.offsets = [Offsets(tokenizer) for _ in self.indices]

    def opening(self) -> Iterable[dict[str, Any]]:
        for i in self.indices if self.prompts else ():
            yield {"index": i, "text": self._echo(i), "logprobs": None, "finish_reason": None}

    def _echo(self, index: int) -> str:
        """The prompt of an answer, if the request wants it back."""
        if not self.prompts:
            return ""
        prompt = self.prompts[index // self.request.n]
        text: str = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
        return text

    def choice(self, piece: Piece) -> dict[str, Any] | None:
        logprobs = self._logprobs(piece.choice, piece.logprobs)
        return {"index": piece.choice, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def whole(self, pieces: list[Piece]) -> Completion:
        return Completion(**self.head, choices=[self._whole(i, pieces) for i in self.indices], usage=self.usage())

    def _whole(self, index: int, pieces: list[Piece]) -> TextChoice:
        own = [p for p in pieces if p.choice == index]
        logprobs = self._logprobs(index, [one for p in own for one in p.logprobs])
        text = self._echo(index) + "".join(p.text for p in own)
        return TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=own[-1].finish or "stop")

    def _logprobs(self, index: int, found: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return {
            "tokens": [self.token_text(t.token) for t in found],
            "token_logprobs": [t.logprob for t in found],
            "top_logprobs": [{self.token_text(k): v for k, v in (*t.likeliest, t[:2])} for t in found],
            "text_offset": [self.offsets[index].put(t.token) for t in found],
        }


# ---------------------------------------------------------------------------------------------- events


async def events(wire: ChatWire | TextWire) -> AsyncIterator[bytes]:
    """Server-sent events; an error on the way is one more event, and then there is no `[DONE]`."""
    try:
        for choice in wire.opening():
            yield _event(wire, [choice])
        async for piece in wire.begun.run.pieces():
            said = wire.choice(piece)
            if said is not None:
                yield _event(wire, [said])
    except ApiError as error:
        yield error.event()
        return
    if wire.counting:
        yield _data({**wire.head, "object": wire.object, "choices": [], "usage": wire.usage().model_dump()})
    yield DONE


def _event(wire: ChatWire | TextWire, choices: list[dict[str, Any]]) -> bytes:
    counts = {"usage": None} if wire.counting else {}
    return _data({**wire.head, "object": wire.object, "choices": choices, **counts})


def _data(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
