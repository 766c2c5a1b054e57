"""The memory-optimal product of frozen weights and their low-rank updates.

One call computes y_i = x W_iᵀ + b_i + scale_i (x̃ A_iᵀ) B_iᵀ for a *group* of projections that read the same input (q, k, v
of an attention; gate, up of an MLP; or a single projection), where x̃ is x after dropout, drawn once for the group.

What autograd would keep for this is wasteful: the low-rank output (rows, out), a scaled copy of it, and x once per
projection. The idea (arXiv 2312.03415, and the kernels of Unsloth) is to write the backward by hand, with g_i = dy_i B_i:

    dA_i = scale_i · g_iᵀ x̃      dB_i = scale_i · dy_iᵀ h_i      dx = Σ dy_i W_i + keep ⊙ Σ scale_i g_i A_i

so that only x (once for the group), h = x̃ Aᵀ (rows, Σr) and references to the weights are kept; W gets no gradient
because it is frozen. The A_i are stacked, so the group costs one skinny product each for h and for dA. The low-rank part
is added into the base product in place.

Factors live in float32 and are cast to x's dtype here, once per call; their gradients return in their own dtype.
The forward and backward formulas are plain functions, so that they run where the autograd engine cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from twofold.lowrank.factors import LowRank


class Projection(NamedTuple):
    """A frozen weight (out, in) with its bias (out,) and, where it is adapted, its low-rank update."""

    weight: Tensor
    bias: Tensor | None
    update: LowRank | None


class Kept(NamedTuple):
    """What dropout left: `mask` is True where x was kept, each kept value scaled by 1 / probability."""

    mask: Bool[Tensor, "rows in_"]
    probability: float

    def apply(self, x: Tensor) -> Tensor:
        return x * self.mask * (1 / self.probability)


@dataclass(frozen=True)
class _Group:
    """Factors of the adapted members in the dtype of the product, A stacked: (Σr, in)."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    A: Tensor | None
    Bs: tuple[Tensor | None, ...]
    scales: tuple[float, ...]

    def slices(self) -> list[slice | None]:
        """Where each member's rank columns lie in h; None for a member without an update."""
        found: list[slice | None] = []
        start = 0
        for B in self.Bs:
            found.append(None if B is None else slice(start, start + B.shape[1]))
            start += 0 if B is None else B.shape[1]
        return found


def drop(x: Float[Tensor, "rows in_"], p: float) -> Kept | None:
    """Draw which values of x survive a dropout of probability p; None when all do."""
    return Kept(torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p), 1 - p) if p > 0 else None


def group_forward(
    x: Float[Tensor, "rows in_"], kept: Kept | None, group: _Group
) -> tuple[list[Tensor], Float[Tensor, "rows ranks"] | None]:
    """The outputs (rows, out_i) of each member, and h = x̃ Aᵀ to keep for the backward."""
    outputs = [F.linear(x, w, b) for w, b in zip(group.weights, group.biases, strict=True)]
    if group.A is None:
        return outputs, None
    h = F.linear(kept.apply(x) if kept else x, group.A)
    for y, B, scale, at in zip(outputs, group.Bs, group.scales, group.slices(), strict=True):
        if B is not None:
            y.addmm_(h[:, at], B.T, alpha=scale)
    return outputs, h


def group_backward(
    gradients: Sequence[Float[Tensor, "rows _"]],
    x: Float[Tensor, "rows in_"],
    kept: Kept | None,
    h: Float[Tensor, "rows ranks"] | None,
    group: _Group,
    *,
    input_gradient: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """dx (rows, in), dA stacked (Σr, in) and each dB (out_i, r_i), from the gradients of the outputs."""
    dx = _input_gradient(gradients, group.weights) if input_gradient else None
    if group.A is None or h is None:
        return dx, None, [None] * len(group.Bs)
    g = torch.empty_like(h)
    dBs: list[Tensor | None] = []
    for dy, B, scale, at in zip(gradients, group.Bs, group.scales, group.slices(), strict=True):
        if B is None:
            dBs.append(None)
            continue
        torch.mul(dy @ B, scale, out=g[:, at])
        dBs.append((dy.T @ h[:, at]).mul_(scale))
    dA = g.T @ (kept.apply(x) if kept else x)
    if dx is not None:
        dx = dx.addmm_(g, group.A) if kept is None else dx.add_(kept.apply(g @ group.A))
    return dx, dA, dBs


def _input_gradient(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    dx = gradients[0] @ weights[0]
    for dy, weight in zip(gradients[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    return dx


class _GroupProduct(torch.autograd.Function):
    """Autograd's door to `group_forward` and `group_backward`; the factors are passed flat so that it sees them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Kept | None, projections: Sequence[Projection], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        group = _cast(projections, x.dtype)
        outputs, h = group_forward(x, kept, group)
        ctx.kept, ctx.group = kept, group
        ctx.dtypes = [f.dtype for f in factors]
        ctx.save_for_backward(x, *([] if h is None else [h]))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        dx, dA, dBs = group_backward(
            gradients, x, ctx.kept, rest[0] if rest else None, ctx.group, input_gradient=ctx.needs_input_grad[0]
        )
        flat: list[Tensor] = []
        for dB, at in zip(dBs, ctx.group.slices(), strict=True):
            if dB is not None and dA is not None:
                flat += [dA[at], dB]
        return dx, None, None, *(f.to(d) for f, d in zip(flat, ctx.dtypes, strict=True))


def _cast(projections: Sequence[Projection], dtype: torch.dtype) -> _Group:
    updates = [p.update for p in projections]
    As = [u.A.to(dtype) for u in updates if u is not None]
    return _Group(
        weights=tuple(p.weight for p in projections),
        biases=tuple(p.bias for p in projections),
        A=None if not As else As[0] if len(As) == 1 else torch.cat(As),
        Bs=tuple(None if u is None else u.B.to(dtype) for u in updates),
        scales=tuple(0.0 if u is None else u.scale for u in updates),
    )


def group_product(
    x: Float[Tensor, "*batch in_"], projections: Sequence[Projection], dropout: float = 0.0
) -> tuple[Float[Tensor, "*batch _"], ...]:
    """y_i = x W_iᵀ + b_i + scale_i (dropout(x) A_iᵀ) B_iᵀ for projections that read the same x.

    Args:
        x: (..., in), in the weights' dtype.
        projections: the members; those without an update are plain frozen linear maps.
        dropout: probability that a value of x is dropped on its way into A, drawn once for the whole group.

    Returns:
        one (..., out_i) per member, in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    updates = [p.update for p in projections if p.update is not None]
    kept = drop(rows, dropout) if updates else None
    factors = [f for u in updates for f in (u.A, u.B)]
    outputs = _GroupProduct.apply(rows, kept, tuple(projections), *factors)
    return tuple(y.view(*x.shape[:-1], -1) for y in outputs)
