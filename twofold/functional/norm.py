"""RMSNorm over a frozen weight, keeping only its input and one number a row."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def rms_norm_backward(
    dy: Float[Tensor, "rows d"], x: Float[Tensor, "rows d"], weight: Float[Tensor, " d"], rstd: Float[Tensor, "rows 1"]
) -> Float[Tensor, "rows d"]:
    """dx = rstd (g - x̂ mean(g x̂)) with g = dy w and x̂ = x rstd, in the precision of rstd."""
    g = dy.to(rstd.dtype) * weight.to(rstd.dtype)
    x_hat = x.to(rstd.dtype) * rstd
    inner = (g * x_hat).mean(-1, keepdim=True)
    return torch.addcmul(g, x_hat, inner, value=-1).mul_(rstd).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return weight * (wide * rstd).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return rms_norm_backward(gradients[0], *ctx.saved_tensors), None, None


def rms_norm(x: Float[Tensor, "rows d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "rows d"]:
    """x / sqrt(mean(x²) + eps) · weight, the mean in at least float32 (arXiv 1910.07467); the weight gets no gradient."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y
