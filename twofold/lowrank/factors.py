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

    def delta(self) -> Float[Tensor, "out in_"]:
        """The update itself, formed in at least float32: (out, in)."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return (self.B.to(dtype) @ self.A.to(dtype)) * self.scale


def merged_weight(weight: Float[Tensor, "*shape"], deltas: list[Tensor]) -> Float[Tensor, "*shape"]:
    """A new weight with the deltas added: summed in at least float32, rounded once to the weight's dtype."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for delta in deltas:
        total += delta.to(total.device, total.dtype)
    return total.to(weight.dtype)


def scale_of(lora_alpha: float, r: int, *, rank_stabilised: bool) -> float:
    """alpha / r (arXiv 2106.09685), or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    return lora_alpha / math.sqrt(r) if rank_stabilised else lora_alpha / r
