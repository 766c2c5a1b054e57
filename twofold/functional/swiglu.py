"""The gated activation silu(gate) · up (arXiv 2002.05202), keeping only its two inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def swiglu_backward(
    dy: Float[Tensor, "rows d"], gate: Float[Tensor, "rows d"], up: Float[Tensor, "rows d"]
) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"]]:
    """The gradients of gate and up."""
    activated = F.silu(gate)
    dgate = torch.ops.aten.silu_backward(dy * up, gate)
    return dgate, activated.mul_(dy)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return swiglu_backward(gradients[0], *ctx.saved_tensors)


def swiglu(gate: Float[Tensor, "rows d"], up: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
    """silu(gate) · up."""
    y: Tensor = _SwiGLU.apply(gate, up)
    return y
