"""twofold chat --base B [--adapter DIR], or --url URL [--model NAME]"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TypeAlias

from twofold.base.chat import Message
from twofold.cli.flags import parse
from twofold.cli.model_flags import ModelFlags
from twofold.cli.remote import first_model, stream_remote
from twofold.cli.terminal import Terminal, stderr
from twofold.engine.request import Sampling
from twofold.errors import ConfigError
from twofold.recipes.generate import GenerationConfig, stream_answer

Speak: TypeAlias = Callable[[Sequence[Message]], Iterator[str]]


@dataclass(frozen=True, kw_only=True)
class ChatFlags(ModelFlags):
    """Talk to a base and its adapter.

    Attributes:
        system: a system message at the beginning.
        max_new_tokens: the most tokens of an answer.
        sampling: how each token is chosen.
        url: of a server to talk to; nothing is loaded here then. Its API key is read from TWOFOLD_API_KEY.
        model: which of that server's models; the first that it lists, if not given.
    """

    system: str | None = None
    max_new_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    url: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if self.url is not None and (given := self.for_loading()):
            raise ConfigError(f"{given} is for models that are loaded here; with --url say --model NAME")
        if self.url is None and self.model is not None:
            raise ConfigError("--model is for servers; without --url say --adapter DIR")

    def for_loading(self) -> str | None:
        """The first flag given that says what is to be loaded here, or how."""
        loading = (f for f in fields(ModelFlags) if getattr(self, f.name) != f.default)
        return next(("--" + f.name.replace("_", "-") for f in loading), None)

    def speaker(self) -> Speak:
        """What answers: a server, or a base that is loaded now."""
        config = GenerationConfig(max_new_tokens=self.max_new_tokens, sampling=self.sampling)
        if self.url is not None:
            return partial(stream_remote, self.url, self.model or first_model(self.url), config=config)
        with Terminal() as terminal:
            return partial(stream_answer, self.load(terminal), config=config)


def run(arguments: list[str]) -> int:
    flags = parse(ChatFlags, arguments, verb="chat", description="Talk; an empty line or Ctrl-D ends it.", bare=())
    speak = flags.speaker()
    stderr.print("an empty line ends the conversation", style="dim")
    messages = [] if flags.system is None else [{"role": "system", "content": flags.system}]
    while said := _ask():
        messages.append({"role": "user", "content": said})
        answer = ""
        for piece in speak(messages):
            answer += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        messages.append({"role": "assistant", "content": answer})
    return 0


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
