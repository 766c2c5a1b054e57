"""Many adapters in one batch: each row of x has updates of its own, with weights of its own.

    y_i = Σ_j w_ij · scale_j · B_j A_j x_i

Two ways lead there. *Masked*: all A stacked, one product h = x Aᵀ over every row and every rank, h zeroed where a row does not have
the adapter, and one product with all B stacked. Nothing is gathered, but work is done for pairs of row and adapter that do not
belong together. *Segments*: for each adapter the rows that have it are gathered, multiplied, and added back: no work too much,
but several small calls an adapter. Which is cheaper follows from the sizes (`masked_is_cheaper`): decode steps of a few rows are
masked, long prompts are cut into segments. The idea is that of the kernels of Punica and S-LoRA (arXiv 2310.18547, 2311.03285).

Rows that have no update get exact zeros, whatever the values of the adapters are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from twofold.lowrank.factors import LowRank

CALLS, MOVE = 4.0e6, 32
"""What the calls of one product or segment, and moving one value, cost in multiply-adds that the machine could do meanwhile.

Fitted to `benchmarks/grouped.py` on one core of an EPYC in float32, 72 cases of 1 to 64 rows, 1 to 32 adapters and ranks 8 to 64:
the way chosen is 0.2 % slower than the better one on average and 7 % at worst.
"""


class Spread(NamedTuple):
    """Which rows have which updates, laid out once for the products of many layers.

    Attributes:
        weights: how much of each update a row gets; 0 for none.
        rows: those that have each update, on the same device.
    """

    weights: Float[Tensor, "rows updates"]
    rows: tuple[Int[Tensor, " some"], ...]

    @classmethod
    def of(cls, weights: Float[Tensor, "rows updates"], device: torch.device) -> Spread:
        """From a table on the CPU, so that a GPU need not be waited for."""
        rows = [column.nonzero()[:, 0] for column in (weights != 0).unbind(1)]
        return cls(weights.to(device), tuple(r.to(device) for r in rows))

    def some(self, updates: Sequence[int]) -> Spread:
        """That of some of the updates."""
        if list(updates) == list(range(len(self.rows))):
            return self
        return Spread(torch.stack([self.weights[:, j] for j in updates], 1), tuple(self.rows[j] for j in updates))


def grouped_update(
    x: Float[Tensor, "rows in_"], updates: Sequence[LowRank], spread: Spread
) -> Float[Tensor, "rows out"]:
    """What several updates of one weight add to its output, row by row, in x's type.

    Args:
        updates: of any ranks and scales, over the same weight.
    """
    if not updates:
        raise ValueError("there is no update to add")
    ranks, counts = [u.rank for u in updates], [len(rows) for rows in spread.rows]
    width = x.shape[1] + updates[0].B.shape[0]
    way = masked if masked_is_cheaper(len(x), width, ranks, counts) else segments
    return way(x, updates, spread)


def masked_is_cheaper(rows: int, width: int, ranks: Sequence[int], counts: Sequence[int]) -> bool:
    """Whether all ranks over all rows, with all factors laid side by side, cost less than gathering rows for each update by itself.

    Args:
        width: in + out of the weight.
        counts: how many rows have each update.
    """
    whole = sum(ranks) * width * (rows + MOVE) + CALLS
    cut = sum((r + MOVE) * count * width + CALLS for r, count in zip(ranks, counts, strict=True) if count)
    return whole <= cut


def masked(x: Float[Tensor, "rows in_"], updates: Sequence[LowRank], spread: Spread) -> Float[Tensor, "rows out"]:
    """`grouped_update` by two products over all rows and all ranks."""
    A = torch.cat([u.A for u in updates]).to(x.dtype)
    B = torch.cat([u.B for u in updates], dim=1).to(x.dtype)
    columns = zip(spread.weights.split(1, 1), updates, strict=True)
    of_ranks = torch.cat([(weights * u.scale).expand(-1, u.rank) for weights, u in columns], 1).to(x.dtype)
    h = F.linear(x, A)
    return F.linear(torch.where(of_ranks == 0, 0.0, h * of_ranks), B)


def segments(x: Float[Tensor, "rows in_"], updates: Sequence[LowRank], spread: Spread) -> Float[Tensor, "rows out"]:
    """`grouped_update` by two products for each update, over the rows that have it."""
    y = x.new_zeros(len(x), updates[0].B.shape[0])
    for j, (update, rows) in enumerate(zip(updates, spread.rows, strict=True)):
        if len(rows):
            scale = (spread.weights[rows, j, None] * update.scale).to(x.dtype)
            h = F.linear(x.index_select(0, rows), update.A.to(x.dtype)) * scale
            y = y.index_add(0, rows, F.linear(h, update.B.to(x.dtype)))
    return y
