"""Which row of a batch has which adapters, and where rows cannot be told apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Rows(NamedTuple):
    """Which row of a batch has which adapters.

    Attributes:
        names: the adapters that occur.
        weights: how much of each a row has; 0 for none.
    """

    names: tuple[str, ...]
    weights: Float[Tensor, "rows names"]

    def groups(self) -> Iterator[tuple[dict[str, float], Int[Tensor, " some"]]]:
        """Each combination of adapters with the rows that have it; not that of the bare base."""
        found: dict[tuple[float, ...], list[int]] = {}
        for i, weights in enumerate(self.weights.tolist()):
            found.setdefault(tuple(weights), []).append(i)
        for weights, chosen in found.items():
            if any(weights):
                yield {n: w for n, w in zip(self.names, weights, strict=True) if w}, torch.tensor(chosen)


def is_routed(name: str) -> bool:
    """Whether a module lies among a mixture's experts, which see the tokens that a router picks, in the router's order."""
    return not {"expert", "experts"}.isdisjoint(name.split(".")[:-1])


def not_rows(base: nn.Module, rows: Rows) -> str:
    """What is said where a module is called with something else than the rows of the batch."""
    return (
        f"a {type(base).__name__} was called with something whose first dimension is not the batch of {len(rows.weights)} rows, so "
        "the rows' adapters cannot be told apart there; run the rows one by one, or give one adapter for each row of the batch"
    )


def in_other_order(base: nn.Module) -> str:
    """What is said of a module behind a router."""
    return (
        f"a {type(base).__name__} among the experts of a mixture sees rows in the order of a router, so the rows' adapters cannot "
        "be told apart there; run the rows one by one, or use adapters that leave single experts out (exclude_modules)"
    )
