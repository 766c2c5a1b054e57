"""The memory-optimal product of frozen weights and their low-rank updates.

One call computes y_i = x W_iᵀ + b_i + scale_i (x̃ A_iᵀ) B_iᵀ for a *group* of projections that read the same input (q, k, v
of an attention; gate, up of an MLP; or a single projection), where x̃ is x after dropout, drawn once for the group.

What autograd would keep for this is wasteful: the low-rank output (rows, out), a scaled copy of it, and x once per
projection. The idea (arXiv 2312.03415, and the kernels of Unsloth) is to write the backward by hand, with g_i = dy_i B_i:

    dA_i = scale_i · g_iᵀ x̃      dB_i = scale_i · dy_iᵀ h_i      dx = Σ dy_i W_i + keep ⊙ Σ scale_i g_i A_i

so that only x (once for the group), h = x̃ Aᵀ (rows, Σr) and references to the weights are kept; W gets no gradient
because it is frozen. The A_i are stacked, so the group costs one skinny product each for h and for dA. The low-rank part
is added into the base product in place, and skinny products are written so that the long side is the one streamed through.

Factors live in float32 and are multiplied in x's type: cast here, or once for several passes by whoever makes the
projections. Their gradients return in their own type.
The forward and backward formulas are plain functions, so that they run where the autograd engine cannot, and so that a
whole decoder block can be made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from twofold.lowrank.factors import LowRank
from twofold.lowrank.frozen import Frozen, product, product_gradient


class Projection(NamedTuple):
    """A frozen weight (out, in) with its bias (out,) and, where it is adapted, its low-rank update.

    Attributes:
        bias: frozen, or learned where it requires a gradient.
        cast: A and B of the update in the type of the products, where that was made before.
    """

    weight: Tensor | Frozen
    bias: Tensor | None
    update: LowRank | None
    cast: tuple[Tensor, Tensor] | None = None

    def learned(self) -> list[Tensor]:
        """What gets a gradient: A, B, the bias, as far as there are any."""
        factors = [] if self.update is None else [self.update.A, self.update.B]
        return [*factors, self.bias] if self.bias is not None and self.bias.requires_grad else factors


class Kept(NamedTuple):
    """What dropout left: `mask` is True where x was kept, each kept value scaled by 1 / probability."""

    mask: Bool[Tensor, "rows in_"]
    probability: float

    def apply(self, x: Tensor) -> Tensor:
        return x * self.mask * (1 / self.probability)


@dataclass(frozen=True)
class Member:
    """One projection of a group: its rank columns in h, None where it is not adapted."""

    weight: Float[Tensor, "out in_"] | Frozen
    bias: Float[Tensor, " out"] | None
    B: Float[Tensor, "out r"] | None
    scale: float
    columns: slice | None
    learns_bias: bool


@dataclass(frozen=True)
class Group:
    """Projections that read the same input, in the type of the products.

    Attributes:
        A: the members' A, stacked: (Σr, in); None where no member is adapted.
        dropout: probability that a value of the input is dropped on its way into A.
    """

    members: tuple[Member, ...]
    A: Float[Tensor, "ranks in_"] | None
    dropout: float = 0.0

    @classmethod
    def of(cls, projections: Sequence[Projection], dtype: torch.dtype, dropout: float = 0.0) -> Group:
        """Stack projections, casting what was not cast before."""
        members, As = [], []
        rank = 0
        for p in projections:
            ready = p.cast if p.cast is not None and p.cast[0].dtype == dtype else None
            A, B = ready or ((None, None) if p.update is None else (p.update.A.to(dtype), p.update.B.to(dtype)))
            columns = None if A is None else slice(rank, rank + len(A))
            scale = 0.0 if p.update is None else p.update.scale
            learns_bias = p.bias is not None and p.bias.requires_grad
            members.append(Member(p.weight, p.bias, B, scale, columns, learns_bias))
            if A is not None:
                As.append(A)
                rank += len(A)
        stacked = None if not As else As[0] if len(As) == 1 else torch.cat(As)
        return cls(tuple(members), stacked, dropout if As else 0.0)

    @property
    def learns(self) -> bool:
        return self.A is not None or any(m.learns_bias for m in self.members)

    def part(self, at: slice) -> Group:
        """The group of some neighbouring members alone."""
        members = self.members[at]
        columns = [m.columns for m in members if m.columns is not None]
        if self.A is None or not columns:
            return Group(members, None)
        start = columns[0].start
        moved = tuple(
            m if m.columns is None else replace(m, columns=slice(m.columns.start - start, m.columns.stop - start))
            for m in members
        )
        return Group(moved, self.A[start : columns[-1].stop], self.dropout)


def drop(x: Float[Tensor, "rows in_"], p: float) -> Kept | None:
    """Draw which values of x survive a dropout of probability p; None when all do."""
    return Kept(torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p), 1 - p) if p > 0 else None


def group_forward(
    x: Float[Tensor, "rows in_"], kept: Kept | None, group: Group
) -> tuple[list[Tensor], Float[Tensor, "rows ranks"] | None]:
    """The outputs (rows, out_i) of each member, and h = x̃ Aᵀ to keep for the backward."""
    outputs = [product(m.weight, x, m.bias) for m in group.members]
    if group.A is None:
        return outputs, None
    h = F.linear(kept.apply(x) if kept else x, group.A)
    for y, m in zip(outputs, group.members, strict=True):
        if m.B is not None:
            y.addmm_(h[:, m.columns], m.B.T, alpha=m.scale)
    return outputs, h


def group_backward(
    gradients: Sequence[Float[Tensor, "rows _"]],
    x: Float[Tensor, "rows in_"],
    kept: Kept | None,
    h: Float[Tensor, "rows ranks"] | None,
    group: Group,
    *,
    input_gradient: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx (rows, in) and, member by member in the order of `Projection.learned`, dA (r, in), dB (out, r) and dbias (out,)."""
    dx = _into_input(gradients, group.members) if input_gradient else None
    dA = None
    if group.A is not None and h is not None:
        g = torch.empty_like(h)
        for dy, m in zip(gradients, group.members, strict=True):
            if m.B is not None:
                torch.mul(dy @ m.B, m.scale, out=g[:, m.columns])
        dA = g.T @ (kept.apply(x) if kept else x)
        if dx is not None:
            dx = dx.addmm_(g, group.A) if kept is None else dx.add_(kept.apply(g @ group.A))
    learned: list[Tensor] = []
    for dy, m in zip(gradients, group.members, strict=True):
        if dA is not None and h is not None and m.columns is not None:
            learned += [dA[m.columns], (h[:, m.columns].T @ dy).mul_(m.scale).T]
        if m.learns_bias:
            learned.append(dy.sum(0))
    return dx, learned


def _into_input(gradients: Sequence[Tensor], members: Sequence[Member]) -> Tensor:
    dx = product_gradient(members[0].weight, gradients[0])
    for dy, member in zip(gradients[1:], members[1:], strict=True):
        dx = product_gradient(member.weight, dy, dx)
    return dx


def typed(gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Gradients as autograd takes them: in the types of what learns, and without gaps."""
    whole = torch.contiguous_format
    return [g.to(d, memory_format=whole).contiguous() for g, d in zip(gradients, dtypes, strict=True)]


class _GroupProduct(torch.autograd.Function):
    """Autograd's door to `group_forward` and `group_backward`; what is learned is passed flat so that it sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Kept | None, group: Group, *learned: Tensor) -> tuple[Tensor, ...]:
        outputs, h = group_forward(x, kept, group)
        ctx.group, ctx.probability = group, None if kept is None else kept.probability
        ctx.dtypes = [t.dtype for t in learned]
        ctx.save_for_backward(x, h, None if kept is None else kept.mask)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, h, mask = ctx.saved_tensors
        kept = None if mask is None else Kept(mask, ctx.probability)
        dx, found = group_backward(gradients, x, kept, h, ctx.group, input_gradient=ctx.needs_input_grad[0])
        return dx, None, None, *typed(found, ctx.dtypes)


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
    group = Group.of(projections, x.dtype, dropout)
    kept = drop(rows, group.dropout)
    outputs = _GroupProduct.apply(rows, kept, group, *(t for p in projections for t in p.learned()))
    return tuple(y.view(*x.shape[:-1], -1) for y in outputs)
