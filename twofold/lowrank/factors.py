"""A low-rank update and what can be read off its factors without forming it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The update ``delta = scale * B @ A`` of a weight (out, in), arXiv 2106.09685.

    Attributes:
        A: (r, in).
        B: (out, r).
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    A: Float[Tensor, "r in_"]
    B: Float[Tensor, "out r"]
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def finite(self) -> bool:
        """Whether float32 holds the delta: no factor has a NaN or infinity, and no entry of their product can overflow."""
        most = self.A.abs().amax().double() * self.B.abs().amax().double() * self.rank * abs(self.scale)
        return bool(most <= torch.finfo(torch.float32).max)

    def transposed(self) -> LowRank:
        """The update of the transposed weight."""
        return LowRank(self.B.T, self.A.T, self.scale)

    def delta(self) -> Float[Tensor, "out in_"]:
        """The update itself, formed in at least float32: (out, in)."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return (self.B.to(dtype) @ self.A.to(dtype)) * self.scale


SUMMED_ELEMENTS = 1 << 19
"""Values of a weight that are summed at once: their float32 stay in a core's cache, and a whole sum is never held."""


def folded(
    weight: Float[Tensor, "out in_"],
    update: LowRank,
    stretch: Float[Tensor, " out"] | None = None,
    into: Float[Tensor, "out in_"] | None = None,
) -> Float[Tensor, "out in_"]:
    """A new weight with the update added and its rows stretched: in at least float32, rounded once to the weight's dtype.

    Some rows at a time, so that little more than the new weight is held.

    Args:
        into: memory for it, of the weight's dtype: fresh memory costs more time than the sum.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B = update.A.to(dtype), update.B.to(dtype)
    made = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if into is None else into
    step = max(1, SUMMED_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        total = (B[rows] @ A).mul_(update.scale).add_(weight[rows].to(dtype))
        made[rows] = total if stretch is None else total.mul_(stretch[rows, None])
    return made


def merged_weight(weight: Float[Tensor, "*shape"], deltas: list[Tensor]) -> Float[Tensor, "*shape"]:
    """A new weight with the deltas added: summed in at least float32, rounded once to the weight's dtype."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for delta in deltas:
        total += delta.to(total.device, total.dtype)
    return total.to(weight.dtype)


def scale_of(lora_alpha: float, r: int, *, rank_stabilised: bool) -> float:
    """alpha / r (arXiv 2106.09685), or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    return lora_alpha / math.sqrt(r) if rank_stabilised else lora_alpha / r
