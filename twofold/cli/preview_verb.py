"""twofold preview CONFIG.yaml"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import Terminal, show_tokens, stdout
from twofold.recipes.preview import preview
from twofold.recipes.settings import read_config


@dataclass(frozen=True, kw_only=True)
class PreviewFlags:
    """The data as the model will see it.

    Attributes:
        config: the configuration of a run.
        examples: how many examples to show.
    """

    config: Positional[Path]
    examples: int = 4


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(PreviewFlags, arguments, verb="preview", description="Show tokens, loss mask and truncation.")
    with Terminal() as terminal:
        found = preview(read_config(flags.config), flags.examples, terminal)
    if as_json:
        print_json(found)
        return 0
    for key, value in found["train"].items():
        stdout.print(f"  {key:<24} {value}")
    for sample in found["samples"]:
        show_tokens(sample, stdout)
    return 0
