"""twofold merge --base B --adapter DIR -o OUT"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.model_flags import ModelFlags
from twofold.cli.terminal import Terminal, duration, stdout
from twofold.errors import ConfigError
from twofold.events import Emit
from twofold.quant import Scheme
from twofold.recipes.adapters import trained_over
from twofold.recipes.merge import merge_checkpoint, merge_requantised, over_packed, said_of_packed


@dataclass(frozen=True, kw_only=True)
class MergeFlags(ModelFlags):
    """Fold adapters into a base.

    Attributes:
        output: the folder to write.
        quantization: how the base was packed that the adapter was trained on, where the adapter does not know; what is merged
            into is the 16-bit base all the same.
        requantize: pack the merged model again, in that way; a weak adapter may be rounded away, which is measured and said.
    """

    output: Annotated[Path, arg(aliases=["-o"])]
    requantize: bool = False


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(
        MergeFlags, arguments, verb="merge", description="Write a standard Hugging Face folder, and prove it."
    )
    if not flags.adapter:
        raise ConfigError("name at least one adapter to merge: --adapter DIR")
    with Terminal() as terminal:
        found = _merged(flags, terminal)
    if as_json:
        print_json(found)
        return 0
    stdout.print(f"{found['output']} written in {duration(found['seconds'])}; {_proved(found)}")
    if "trained_over" in found:
        stdout.print(said_of_packed(found["trained_over"]))
    return 0


def _merged(flags: MergeFlags, emit: Emit) -> dict[str, Any]:
    """Into the 16-bit base, or packed again where that is asked for; compared with a packed base where there was one."""
    scheme = Scheme(flags.quantization) if flags.quantization else trained_over(list(flags.adapter))
    if flags.requantize and scheme is None:
        raise ConfigError(
            "--requantize packs as the base was packed in training, but this adapter's was not; say how with --quantization"
        )
    base = flags.load_as(emit, None)
    if scheme is None:
        return merge_checkpoint(base, flags.output, emit=emit)
    if flags.requantize:
        return merge_requantised(base, flags.load_as(emit, scheme), flags.output, emit)
    found = merge_checkpoint(base, flags.output, emit=emit)
    return {**found, "trained_over": over_packed(flags.load_as(emit, scheme), flags.output, None, emit)}


def _proved(found: Mapping[str, Any]) -> str:
    proof = found.get("verification")
    if proof:
        return (
            f"read back, it differs from the adapter by at most {proof['max_abs_logit_difference']:.3g} in a logit "
            f"(noise allows {proof['tolerance']:.3g})"
        )
    return f"not proved: {found['verification_skipped']}" if "verification_skipped" in found else "packed again"
