"""twofold plan --base B [--r 16 --target-modules all-linear --dtype bfloat16 --sequence-length 1024 --batch-size 4]"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from twofold.adapter.config import LoraConfig
from twofold.base.load import DEFAULT_BASE
from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import gigabytes, stdout
from twofold.recipes.plan import plan


@dataclass(frozen=True, kw_only=True)
class PlanFlags(LoraConfig):
    """What a training costs.

    Attributes:
        base: a Hugging Face directory, a hub id, a `.gguf` file or a built-in name.
        dtype: type of the frozen weights.
        sequence_length: tokens of an example.
        batch_size: examples in one forward pass.
        gradient_checkpointing: keep only each layer's input.
    """

    base: str = DEFAULT_BASE
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    sequence_length: int = 1024
    batch_size: int = 4
    gradient_checkpointing: bool = False


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    flags = parse(
        PlanFlags, arguments, verb="plan", description="Parameters (exact) and memory (estimated) of a training."
    )
    found = plan(
        flags.base,
        LoraConfig(**{f.name: getattr(flags, f.name) for f in fields(LoraConfig)}),
        dtype=getattr(torch, flags.dtype),
        sequence_length=flags.sequence_length,
        batch_size=flags.batch_size,
        gradient_checkpointing=flags.gradient_checkpointing,
    )
    print_json(found) if as_json else _show(found)
    return 0


def _show(found: dict[str, Any]) -> None:
    parameters, memory = found["parameters"], found["memory"]
    stdout.print(
        f"{parameters['trainable']:,} of {parameters['base']:,} parameters train ({parameters['fraction']:.2%}) in "
        f"{parameters['modules']} modules; the adapter's file takes {gigabytes(found['adapter_file_bytes'])}"
    )
    for term, count in memory.items():
        if term != "total":
            stdout.print(f"  {term:<12} {gigabytes(count):>10}")
    total = memory["total"]
    stdout.print(
        f"  {'total':<12} {gigabytes(total['expected']):>10}   estimated, {gigabytes(total['low'])} to {gigabytes(total['high'])}"
        f" on the {found['path']} path"
    )
