"""`twofold generate` and `twofold chat`: answers, by the renderer that training used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from twofold.base.chat import Message
from twofold.base.load import Base
from twofold.engine.engine import Engine
from twofold.engine.request import Request, Sampling
from twofold.engine.text import TextStream, decoded
from twofold.events import Emit, silent


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How answers are made.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        sampling: how each token is chosen; greedy by default.
    """

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)


def request(base: Base, messages: Sequence[Message], config: GenerationConfig) -> Request:
    """The request for the next answer in a conversation; a base without a template continues the last message."""
    renderer = base.renderer
    prompt = (
        renderer.chat_prompt(messages) if renderer.template else renderer.completion_prompt(messages[-1]["content"])
    )
    return Request(
        token_ids=prompt,
        max_new_tokens=config.max_new_tokens,
        stop_ids=tuple(renderer.end_token_ids),
        sampling=config.sampling,
    )


def answers(
    base: Base,
    conversations: Sequence[Sequence[Message]],
    config: GenerationConfig,
    emit: Emit = silent,
    task: str = "generating",
) -> list[str]:
    """The next answer in each conversation."""
    completions = Engine(base.model).generate([request(base, c, config) for c in conversations], emit, task)
    return [decoded(base.tokenizer, c.token_ids) for c in completions]


def stream_answer(base: Base, messages: Sequence[Message], config: GenerationConfig) -> Iterator[str]:
    """One answer in pieces of text, as its tokens are made."""
    text = TextStream(base.tokenizer)
    for token in Engine(base.model).stream(request(base, messages, config)):
        if piece := text.put(token):
            yield piece
    if rest := text.finish():
        yield rest
