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
from twofold.recipes.merge import (
    check_merged,
    merge_from_disk,
    merge_requantised,
    over_packed,
    said_of_check,
    said_of_packed,
)


@dataclass(frozen=True, kw_only=True)
class MergeFlags(ModelFlags):
    """Fold adapters into a base.

    Attributes:
        output: the folder to write.
        quantization: how the base was packed that the adapter was trained on, where the adapter does not know; what is merged
            into is the 16-bit base all the same.
        check: write nothing, but say whether this folder holds the adapters merged into the base, bit for bit.
        verify: read the folder back and compare its logits with those of the adapter kept apart, which loads the base.
        requantize: pack the merged model again, in that way; a weak adapter may be rounded away, which is measured and said.
    """

    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    check: Path | None = None
    requantize: bool = False

    verify: bool = True


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(
        MergeFlags, arguments, verb="merge", description="Write a standard Hugging Face folder, and prove it."
    )
    folder = flags.output or flags.check
    if folder is None:
        raise ConfigError("--output is missing: the folder to write; see twofold merge --help")
    if flags.output and flags.check:
        raise ConfigError("--check writes nothing, so it takes no --output; name one of the two")
    if not flags.adapter:
        raise ConfigError("name at least one adapter to merge: --adapter DIR")
    if flags.check:
        return _check(flags, folder, as_json)
    with Terminal() as terminal:
        found = _merged(flags, folder, terminal)
    if as_json:
        print_json(found)
        return 0
    stdout.print(f"{found['output']} written in {duration(found['seconds'])}; {_proved(found)}")
    if "trained_over" in found:
        stdout.print(said_of_packed(found["trained_over"]))
    return 0


def _check(flags: MergeFlags, folder: Path, as_json: bool) -> int:
    with Terminal() as terminal:
        found = check_merged(flags.asked().mapped(terminal), folder, terminal)
    if as_json:
        print_json(found)
    else:
        stdout.print(said_of_check(found))
    return 0 if found["holds_the_adapter"] else 1


def _merged(flags: MergeFlags, output: Path, emit: Emit) -> dict[str, Any]:
    """Into the 16-bit base, or packed again where that is asked for; compared with a packed base where there was one."""
    scheme = Scheme(flags.quantization) if flags.quantization else trained_over(list(flags.adapter))
    asked = flags.asked()
    if flags.requantize and scheme is None:
        raise ConfigError(
            "--requantize packs as the base was packed in training, but this adapter's was not; say how with --quantization"
        )
    if flags.requantize and scheme is not None:
        return merge_requantised(asked.load(emit), asked.load(emit, scheme), output, emit)
    found = merge_from_disk(asked, output, emit, verify=flags.verify)
    if scheme is None or not flags.verify:
        return found
    return {**found, "trained_over": over_packed(asked.load(emit, scheme), output, None, emit)}


def _proved(found: Mapping[str, Any]) -> str:
    proof = found.get("verification")
    if proof:
        return (
            f"read back, it differs from the adapter by at most {proof['max_abs_logit_difference']:.3g} in a logit "
            f"(noise allows {proof['tolerance']:.3g}), which took {duration(found['proof_seconds'])} more"
        )
    return f"not proved: {found['verification_skipped']}" if "verification_skipped" in found else "packed again"
