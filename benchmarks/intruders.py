"""Intruders told in a few readings of each weight, against whole decompositions in float32: the table of docs/inspecting.md.

    python benchmarks/intruders.py ADAPTER [ADAPTER ...] [--base smollm2-135m-instruct] [--every 18]

Each adapter as it is, and 10 and 30 times as loud, since trained ones bring few intruders; every eighteenth module.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from twofold.adapter.files import open_adapter
from twofold.adapter.updates import updates_of
from twofold.base.load import DEFAULT_BASE
from twofold.base.streamed import open_streamed
from twofold.inspection.against_base import type_of_products
from twofold.lowrank.beside import Weight
from twofold.lowrank.factors import LowRank
from twofold.lowrank.intruders import ALIKE, intruders, intruders_exactly
from twofold.native.training import native_kernels
from twofold.recipes.inspect import DIRECTIONS

LOUD = (1, 10, 30)


@torch.no_grad()
def compared(adapter: Path, base: str, every: int, loud: int) -> list[tuple[float, float]]:
    """Of the largest directions of so many modules, the cosine by decomposition and that of a few readings."""
    streamed, found = open_streamed(base), []
    for name, update in list(updates_of(open_adapter(adapter)).items())[::every]:
        weight, louder = streamed.read(f"{name}.weight"), LowRank(update.A, update.B, update.scale * loud)
        exactly = intruders_exactly(Weight(weight, torch.float32), louder, DIRECTIONS)
        with native_kernels():
            told = intruders(Weight(weight, type_of_products(weight)), louder, DIRECTIONS)
        found += zip(exactly.cosines, told.cosines, strict=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--every", type=int, default=18)
    given = parser.parse_args()
    print(
        "| adapter | times as loud | intruders by decomposition | told the same | where not: by decomposition, told |"
    )
    print("|---|---|---|---|---|")
    for adapter in given.adapters:
        for loud in LOUD:
            pairs = compared(adapter, given.base, given.every, loud)
            others = [(x, t) for x, t in pairs if (x < ALIKE) != (t < ALIKE)]
            said = ", ".join(f"{x:.2f} {t:.2f}" for x, t in others)
            new = sum(x < ALIKE for x, _ in pairs)
            print(f"| {adapter} | {loud} | {new} of {len(pairs)} | {len(pairs) - len(others)} | {said} |", flush=True)


if __name__ == "__main__":
    main()
