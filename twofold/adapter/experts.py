"""Which parameter of a module each pair of a file's factors belongs to, where the module itself is not at hand.

A file tells the parameters of one module apart by position alone (`layers/experts.py`), while ranks and scales go by their names.
All parameters of a mixture have as many experts, so the names belong where the rows of A, divided by the name's rank, give the
same number of experts everywhere. A name that stands alone in `target_parameters` may be of any module: one that stands there
with a part of this module's path goes before it. Where that leaves several orders, it is the one in which transformers makes the
parameters; that of `target_parameters` says nothing, since PEFT writes it as it comes out of a set.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.names import matches

MADE = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "v1", "w2")
"""Parameters of mixtures in the order in which transformers makes them, in every family that has them."""


class Placed(NamedTuple):
    """A pair's parameter, with how many experts it has."""

    name: str
    experts: int


def parameters_named(config: LoraConfig, module: str) -> list[str]:
    """Names of the parameters of this module that `target_parameters` may mean; none of one that `target_modules` names itself."""
    entries, targets = config.target_parameters or (), config.target_modules
    if not isinstance(targets, str) and matches(targets, module):
        return []
    last = dict.fromkeys(entry.rpartition(".")[2] for entry in entries)
    return [name for name in last if matches(entries, f"{module}.{name}")]


def placed(config: LoraConfig, module: str, rows: Sequence[int]) -> list[Placed] | None:
    """The parameters of a module that its pairs belong to; None where no names fit, or nothing tells which of several orders it is.

    Args:
        rows: of each pair's A, in the order of the module's parameters.
    """
    named = parameters_named(config, module)
    with_path = [entry for entry in config.target_parameters or () if "." in entry]
    meant = [name for name in named if matches(with_path, f"{module}.{name}")]
    return _in_only_order(config, module, meant, rows) or _in_only_order(config, module, named, rows)


def _in_only_order(config: LoraConfig, module: str, named: Sequence[str], rows: Sequence[int]) -> list[Placed] | None:
    orders = permutations(named, len(rows))
    fitting = [found for names in orders if (found := _fitted(config, module, names, rows))]
    as_made = [found for found in fitting if _as_made([one.name for one in found])]
    only = fitting if len(fitting) == 1 else as_made
    return only[0] if len(only) == 1 else None


def _fitted(config: LoraConfig, module: str, names: Sequence[str], rows: Sequence[int]) -> list[Placed] | None:
    """The names with the number of experts, if that is the same whole number for all."""
    ranks = [resolve(config, f"{module}.{name}").r for name in names]
    counts = {divmod(n, r) for n, r in zip(rows, ranks, strict=True)}
    experts, left = next(iter(counts)) if len(counts) == 1 else (0, 0)
    return [Placed(name, experts) for name in names] if experts and not left else None


def _as_made(names: Sequence[str]) -> bool:
    places = [MADE.index(name) for name in names if name in MADE]
    return len(places) == len(names) and places == sorted(places)
