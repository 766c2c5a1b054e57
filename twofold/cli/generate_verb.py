"""twofold generate --base B [--adapter DIR[:scale]] PROMPT"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from tyro.conf import Positional

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.model_flags import ModelFlags
from twofold.cli.terminal import Terminal
from twofold.engine.request import Sampling
from twofold.recipes.generate import GenerationConfig, stream_answer


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(ModelFlags):
    """Answer a prompt.

    Attributes:
        prompt: what to answer.
        system: a system message before it.
        max_new_tokens: the most tokens of the answer.
        sampling: how each token is chosen.
    """

    prompt: Positional[str]
    system: str | None = None
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(GenerateFlags, arguments, verb="generate", description="Answer a prompt; the text goes to stdout.")
    with Terminal() as terminal:
        base = flags.load(terminal)
    messages = [{"role": "user", "content": flags.prompt}]
    if flags.system is not None:
        messages.insert(0, {"role": "system", "content": flags.system})
    pieces = stream_answer(
        base, messages, GenerationConfig(max_new_tokens=flags.max_new_tokens, sampling=flags.sampling)
    )
    if as_json:
        print_json({"prompt": flags.prompt, "text": "".join(pieces)})
        return 0
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return 0
