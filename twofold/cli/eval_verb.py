"""twofold eval --base B [--adapter DIR] --data FILE [--generate]"""

from __future__ import annotations

from dataclasses import dataclass

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.model_flags import ModelFlags
from twofold.cli.terminal import Terminal, stdout
from twofold.data.examples import DataConfig
from twofold.recipes.evaluate import evaluate, exact_match
from twofold.recipes.generate import GenerationConfig, check_generates


@dataclass(frozen=True, kw_only=True)
class EvalFlags(ModelFlags):
    """Loss, accuracy and exact match on held-out data.

    Attributes:
        data: JSONL, JSON, CSV or Parquet, a folder of them, or a hub data set.
        system: a system message for conversations that have none.
        max_length: the most tokens an example may have.
        generate: also generate each conversation's last answer and count exact matches.
        max_new_tokens: the most tokens of a generated answer.
    """

    data: str
    system: str | None = None
    max_length: int = 2048
    generate: bool = False
    max_new_tokens: int = 256


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(EvalFlags, arguments, verb="eval", description="Evaluate a base or an adapter on held-out data.")
    data = DataConfig(train=flags.data, system=flags.system, max_length=flags.max_length)
    with Terminal() as terminal:
        base = flags.load(terminal)
        if flags.generate:
            check_generates(base)
        found = evaluate(base, data, terminal)
        if flags.generate:
            found |= exact_match(base, data, GenerationConfig(max_new_tokens=flags.max_new_tokens), terminal)
    if as_json:
        print_json(found)
        return 0
    for key, value in found.items():
        stdout.print(f"  {key:<16} {value:.4f}" if isinstance(value, float) else f"  {key:<16} {value:,}")
    return 0
