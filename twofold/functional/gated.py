"""The activations of gated MLPs, f(gate) · up (arXiv 2002.05202), and the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from twofold.functional.fusing import fusible


@dataclass(frozen=True)
class Activation:
    """A function of one value, and the gradient of its input from that of its output and the input."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")
    ),
}
"""By the names that transformers' configurations use."""


@fusible
def gated(gate: Float[Tensor, "rows d"], up: Float[Tensor, "rows d"], f: Activation) -> Float[Tensor, "rows d"]:
    """f(gate) · up."""
    return f.forward(gate).mul_(up)


@fusible
def gated_backward(
    dy: Float[Tensor, "rows d"], gate: Float[Tensor, "rows d"], up: Float[Tensor, "rows d"], f: Activation
) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"]]:
    """The gradients of gate and up for y = f(gate) · up."""
    return f.backward(dy * up, gate), f.forward(gate).mul_(dy)
