"""Which parameter of a module each pair of a file's factors belongs to, where the module itself is not at hand.

A file tells the parameters of one module apart by position alone (`layers/experts.py`), while ranks and scales go by their names.
All parameters of a mixture have as many experts, so the names belong where the rows of A, divided by the name's rank, give the
same number of experts everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.names import matches


class Placed(NamedTuple):
    """A pair's parameter, with how many experts it has."""

    name: str
    experts: int


def parameters_named(config: LoraConfig, module: str) -> list[str]:
    """Names of the parameters of this module that `target_parameters` may mean, in its order."""
    entries = config.target_parameters or ()
    last = dict.fromkeys(entry.rpartition(".")[2] for entry in entries)
    return [name for name in last if matches(entries, f"{module}.{name}")]


def placed(config: LoraConfig, module: str, rows: Sequence[int]) -> list[Placed] | None:
    """The parameters of a module that its pairs belong to; None where no names fit.

    Where several orders fit, so that ranks are the same in all of them, it is that of `target_parameters`.

    Args:
        rows: of each pair's A, in the order of the module's parameters.
    """
    for names in permutations(parameters_named(config, module), len(rows)):
        ranks = [resolve(config, f"{module}.{name}").r for name in names]
        counts = [n // r for n, r in zip(rows, ranks, strict=True)]
        if len(set(counts)) == 1 and [c * r for c, r in zip(counts, ranks, strict=True)] == list(rows):
            return [Placed(name, count) for name, count in zip(names, counts, strict=True)]
    return None
