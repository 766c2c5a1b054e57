"""RMSNorm over a frozen weight (arXiv 1910.07467): forward and backward as plain functions, and for autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.functional.fusing import fusible


class Norm(NamedTuple):
    """A frozen RMSNorm. The weight's type says where the result is rounded: rows of bfloat16 times a weight of bfloat16 are
    rounded before the product, as Llama does; times one of float32, after it, as Gemma does."""

    weight: Float[Tensor, " d"]
    eps: float


def rms_norm_forward(x: Float[Tensor, "rows d"], norm: Norm) -> Float[Tensor, "rows d"]:
    """x / sqrt(mean(x²) + eps) · weight, the mean in at least float32."""
    return normed(x, reciprocal_rms(x, norm), norm)


@fusible
def reciprocal_rms(x: Float[Tensor, "rows d"], norm: Norm) -> Float[Tensor, "rows 1"]:
    """ρ = 1 / sqrt(mean(x²) + eps) of every row, in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return length.square_().div_(x.shape[-1]).add_(norm.eps).rsqrt_()


@fusible
def normed(x: Float[Tensor, "rows d"], rho: Float[Tensor, "rows 1"], norm: Norm) -> Float[Tensor, "rows d"]:
    """x ρ · weight."""
    return (x * rho).to(norm.weight.dtype).mul_(norm.weight).to(x.dtype)


@fusible
def rms_norm_backward(
    dy: Float[Tensor, "rows d"],
    x: Float[Tensor, "rows d"],
    rho: Float[Tensor, "rows 1"],
    norm: Norm,
    onto: Float[Tensor, "rows d"] | None = None,
) -> Float[Tensor, "rows d"]:
    """dx = ρ (g - x ρ² mean(g x)) with g = dy w, on top of another gradient of x."""
    g = (dy * norm.weight).to(rho.dtype)
    shared = torch.linalg.vecdot(g, x.to(rho.dtype))[:, None].mul_(rho.pow(3)).div_(-x.shape[-1])
    dx = g.mul_(rho).addcmul_(x, shared).to(x.dtype)
    return dx if onto is None else dx + onto


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        rho = reciprocal_rms(x, norm)
        ctx.norm = norm
        ctx.save_for_backward(x, rho)
        return normed(x, rho, norm)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, rho = ctx.saved_tensors
        return rms_norm_backward(gradients[0], x, rho, ctx.norm), None


def rms_norm(x: Float[Tensor, "rows d"], norm: Norm) -> Float[Tensor, "rows d"]:
    """`rms_norm_forward` with its gradient; the weight gets none."""
    y: Tensor = _RMSNorm.apply(x, norm)
    return y
