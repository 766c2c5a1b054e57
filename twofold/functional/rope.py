"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of transformers' Llama."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def rotate(
    x: Float[Tensor, "rows heads d"], cos: Float[Tensor, "rows half"], sin: Float[Tensor, "rows half"]
) -> Float[Tensor, "rows heads d"]:
    """Turn each pair (x_i, x_{i + d/2}) by its row's angles; turning by -sin undoes it."""
    first, second = x.chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat((torch.addcmul(first * c, second, s, value=-1), torch.addcmul(second * c, first, s)), dim=-1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return rotate(gradients[0], cos, -sin), None, None


def rope(
    x: Float[Tensor, "rows heads d"], cos: Float[Tensor, "rows half"], sin: Float[Tensor, "rows half"]
) -> Float[Tensor, "rows heads d"]:
    """`rotate` with its gradient, which is the turn back; only the angles are kept."""
    y: Tensor = _Rope.apply(x, cos, sin)
    return y
