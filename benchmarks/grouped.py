"""The two ways of a mixed batch, masked products and segments, over a grid of sizes: where `grouped.CALLS` comes from.

Layers of SmolLM2-135M (576 to 576, 576 to 1536), float32, one thread; every row has one adapter, the adapters dealt out in turn.
For each case the microseconds of both ways, which is faster, and what `masked_is_cheaper` says.

    python benchmarks/grouped.py

Prints a markdown table, and by how much the rule's choice is slower than the better way, over the whole grid: mean and worst.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from twofold.lowrank.factors import LowRank
from twofold.lowrank.grouped import Spread, masked, masked_is_cheaper, segments

ROWS, ADAPTERS, RANKS = (1, 4, 16, 64), (1, 4, 8, 16, 32), (8, 16, 64)
WIDTHS = ((576, 576), (576, 1536))
TIMES = 9


class Case(NamedTuple):
    rows: int
    adapters: int
    r: int
    in_features: int
    out_features: int


def microseconds(work: Callable[[], Any]) -> float:
    took = []
    for _ in range(TIMES):
        started = time.perf_counter()
        work()
        took.append(time.perf_counter() - started)
    return statistics.median(took[1:]) * 1e6


def measured(case: Case) -> tuple[float, float, bool]:
    """Microseconds masked and in segments, and whether the rule says masked."""
    x = torch.randn(case.rows, case.in_features)
    updates = [
        LowRank(torch.randn(case.r, case.in_features), torch.randn(case.out_features, case.r), 1.0)
        for _ in range(case.adapters)
    ]
    weights = torch.eye(case.adapters)[torch.arange(case.rows) % case.adapters]
    counts = (weights != 0).sum(0).tolist()
    rule = masked_is_cheaper(case.rows, case.in_features + case.out_features, [case.r] * case.adapters, counts)
    spread = Spread.of(weights, x.device)
    return *(microseconds(partial(way, x, updates, spread)) for way in (masked, segments)), rule  # type: ignore[return-value]


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    losses = []
    print(
        "| rows | adapters | r | in, out | masked µs | segments µs | faster | rule |\n|---|---|---|---|---|---|---|---|"
    )
    for rows, adapters, r, width in itertools.product(ROWS, ADAPTERS, RANKS, WIDTHS):
        if adapters <= rows:
            one, other, rule = measured(Case(rows, adapters, r, *width))
            losses.append((one if rule else other) / min(one, other) - 1)
            better = "masked" if one <= other else "segments"
            print(
                f"| {rows} | {adapters} | {r} | {width} | {one:.0f} | {other:.0f} | {better} | {'masked' if rule else 'segments'} |"
            )
    print(f"\nThe rule loses {statistics.mean(losses):.0%} to the better way on average, {max(losses):.0%} at worst.")


if __name__ == "__main__":
    main()
