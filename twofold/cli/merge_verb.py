"""twofold merge --base B --adapter DIR -o OUT"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.model_flags import ModelFlags
from twofold.cli.terminal import Terminal, duration, stdout
from twofold.errors import ConfigError
from twofold.recipes.merge import merge_checkpoint


@dataclass(frozen=True, kw_only=True)
class MergeFlags(ModelFlags):
    """Fold adapters into a base.

    Attributes:
        output: the folder to write.
    """

    output: Annotated[Path, arg(aliases=["-o"])]


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(
        MergeFlags, arguments, verb="merge", description="Write a standard Hugging Face folder, and prove it."
    )
    if not flags.adapter:
        raise ConfigError("name at least one adapter to merge: --adapter DIR")
    with Terminal() as terminal:
        found = merge_checkpoint(flags.load(terminal), flags.output, emit=terminal)
    if as_json:
        print_json(found)
        return 0
    proof = found["verification"]
    stdout.print(
        f"{found['output']} written in {duration(found['seconds'])}; "
        + (
            f"read back, it differs from the adapter by at most {proof['max_abs_logit_difference']:.3g} in a logit "
            f"(noise allows {proof['tolerance']:.3g})"
            if proof
            else f"not proved: {found['verification_skipped']}"
        )
    )
    return 0
