"""`twofold generate` and `twofold chat`: answers, by the renderer that training used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from twofold.base.chat import Message
from twofold.base.head import head_of, task_of
from twofold.base.load import Base
from twofold.engine.answering import answer_tokens
from twofold.engine.engine import Engine
from twofold.engine.request import Request, Sampling
from twofold.engine.text import TextStream, decoded
from twofold.errors import ConfigError
from twofold.events import Emit, Progress, silent


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
    """The request for the next answer in a conversation; a base without a template continues the last message.

    Raises:
        ConfigError: the base generates nothing, or answers single prompts alone.
    """
    return Request(
        token_ids=_prompt(base, messages),
        max_new_tokens=config.max_new_tokens,
        stop_ids=tuple(base.renderer.end_token_ids),
        sampling=config.sampling,
    )


def check_generates(base: Base) -> None:
    """Raises ConfigError if the base names classes instead of making text."""
    head = head_of(base.model)
    if head.task == "sequence-classification":
        raise ConfigError(
            f"this adapter was trained to name a class ({', '.join(head.labels)}) and generates no text; twofold eval measures it"
        )


def _prompt(base: Base, messages: Sequence[Message]) -> list[int]:
    check_generates(base)
    renderer, head = base.renderer, head_of(base.model)
    if head.task == "seq2seq":
        if len(messages) != 1:
            raise ConfigError(f"a {head.words} answers a single prompt, without a system message or turns before it")
        found: list[int] = base.tokenizer(messages[0]["content"])["input_ids"]
        return found
    return renderer.chat_prompt(messages) if renderer.template else renderer.completion_prompt(messages[-1]["content"])


def answers(
    base: Base,
    conversations: Sequence[Sequence[Message]],
    config: GenerationConfig,
    emit: Emit = silent,
    task: str = "generating",
) -> list[str]:
    """The next answer in each conversation.

    Raises:
        ConfigError: as `request`.
    """
    requests = [request(base, c, config) for c in conversations]
    if task_of(base.model) == "seq2seq":
        made = [list(answer_tokens(base.model, one)) for one in _told(requests, emit, task)]
    else:
        made = [completion.token_ids for completion in Engine(base.model).generate(requests, emit, task)]
    return [decoded(base.tokenizer, tokens) for tokens in made]


def _told(requests: Sequence[Request], emit: Emit, task: str) -> Iterator[Request]:
    """The requests one after the other, with word of how many are done."""
    for done, one in enumerate(requests, start=1):
        yield one
        emit(Progress(task=task, done=done, total=len(requests)))


def stream_answer(base: Base, messages: Sequence[Message], config: GenerationConfig) -> Iterator[str]:
    """One answer in pieces of text, as its tokens are made.

    Raises:
        ConfigError: as `request`.
    """
    asked = request(base, messages, config)
    tokens = answer_tokens(base.model, asked) if task_of(base.model) == "seq2seq" else Engine(base.model).stream(asked)
    text = TextStream(base.tokenizer)
    for token in tokens:
        if piece := text.put(token):
            yield piece
    if rest := text.finish():
        yield rest
