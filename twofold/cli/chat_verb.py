"""twofold chat --base B [--adapter DIR]"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from twofold.cli.flags import parse
from twofold.cli.model_flags import ModelFlags
from twofold.cli.terminal import Terminal, stderr
from twofold.engine.request import Sampling
from twofold.recipes.generate import GenerationConfig, stream_answer


@dataclass(frozen=True, kw_only=True)
class ChatFlags(ModelFlags):
    """Talk to a base and its adapter.

    Attributes:
        system: a system message at the beginning.
        max_new_tokens: the most tokens of an answer.
        sampling: how each token is chosen.
    """

    system: str | None = None
    max_new_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)


def run(arguments: list[str]) -> int:
    flags = parse(ChatFlags, arguments, verb="chat", description="Talk; an empty line or Ctrl-D ends it.", bare=())
    with Terminal() as terminal:
        base = flags.load(terminal)
    stderr.print("an empty line ends the conversation", style="dim")
    config = GenerationConfig(max_new_tokens=flags.max_new_tokens, sampling=flags.sampling)
    messages = [] if flags.system is None else [{"role": "system", "content": flags.system}]
    while said := _ask():
        messages.append({"role": "user", "content": said})
        answer = ""
        for piece in stream_answer(base, messages, config):
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
