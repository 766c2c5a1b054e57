"""DoRA (arXiv 2402.09353): a weight's direction changes by a low-rank update, the length of its rows is learned apart.

    W' = m / ||W + scale B A|| ⊙ (W + scale B A), row by row, with m (out,) learned and ||W|| at the start

The norm is a constant to the gradient, as the paper proposes and PEFT does. It needs no BA:

    ||W + sBA||² = ||W||² + 2s · rowdot(B, W Aᵀ) + s² · rowdot(B, B (A Aᵀ))

of which the first term is computed once for a base, and the others are as cheap as r rows of a forward pass.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.lowrank.factors import LowRank

WIDE_ELEMENTS = 1 << 23
"""Values of a large weight that are widened at once."""


def _wide_rows(weight: Tensor) -> list[Tensor]:
    """The weight's rows, some at a time."""
    return list(weight.split(max(1, WIDE_ELEMENTS // weight.shape[1])))


@torch.no_grad()
def row_squares(weight: Float[Tensor, "out in_"]) -> Float[Tensor, " out"]:
    """||W||² of each row, in float32 or wider."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.cat([rows.to(dtype).square().sum(1) for rows in _wide_rows(weight)])


@torch.no_grad()
def row_norms(
    weight: Float[Tensor, "out in_"], squares: Float[Tensor, " out"], update: LowRank
) -> Float[Tensor, " out"]:
    """||W + scale B A|| of each row, in float32 or wider, never zero so that it may divide.

    Args:
        squares: `row_squares(weight)`.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B, s = update.A.to(dtype), update.B.to(dtype), update.scale
    crossed = torch.cat([rows.to(dtype) @ A.T for rows in _wide_rows(weight)])
    found = squares.to(dtype) + (B * (2 * s * crossed + s * s * (B @ (A @ A.T)))).sum(1)
    return found.clamp_min(torch.finfo(dtype).tiny).sqrt()
