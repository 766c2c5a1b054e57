"""The memory-optimal product of frozen weights and their low-rank updates.

One call computes y_i = x W_iᵀ + b_i + scale_i (x̃ A_iᵀ) B_iᵀ for a *group* of projections that read the same input (q, k, v
of an attention; gate, up of an MLP; or a single projection), where x̃ is x after dropout, drawn once for the group.

What autograd would keep for this is wasteful: the low-rank output (rows, out), a scaled copy of it, and x once per
projection. The idea (arXiv 2312.03415, and the kernels of Unsloth) is to write the backward by hand, with g_i = dy_i B_i:

    dA_i = scale_i · g_iᵀ x̃      dB_i = scale_i · dy_iᵀ h_i      dx = Σ dy_i W_i + keep ⊙ Σ scale_i g_i A_i

so that only x (once for the group), h = x̃ Aᵀ (rows, Σr) and references to the weights are kept; W gets no gradient
because it is frozen. The A_i are stacked, so the group costs one skinny product each for h and for dA. The low-rank part
is added into the base product in place, and skinny products are written so that the long side is the one streamed through.

DoRA (arXiv 2402.09353) stretches each output: y_i = c_i ⊙ (x W_iᵀ + scale_i (x̃ A_iᵀ) B_iᵀ) + b_i with c (out,) learned. Then the
formulas hold for du = c ⊙ dy in place of dy, and dc = Σ dy ⊙ u over the rows, for which the unstretched output u is kept too,
side by side with h. A factor that is frozen (A in LoRA-FA, arXiv 2308.03303) costs no gradient; x is then not kept for it.

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
from jaxtyping import Bool, Float
from torch import Tensor

from twofold.lowrank.factors import LowRank
from twofold.lowrank.products import Frozen, Term, crossed, sum_of_products


class Projection(NamedTuple):
    """A frozen weight (out, in) with its bias (out,) and, where it is adapted, its low-rank update.

    Attributes:
        bias: frozen, or learned where it requires a gradient.
        cast: A and B of the update in the type of the products, where that was made before.
        stretch: DoRA's factor (out,) of the whole output but its bias, in float32 or wider.
    """

    weight: Tensor | Frozen
    bias: Tensor | None
    update: LowRank | None
    cast: tuple[Tensor, Tensor] | None = None
    stretch: Tensor | None = None

    def learned(self) -> list[Tensor]:
        """What gets a gradient: A, B, the bias, the stretch, as far as they are there and not frozen."""
        factors = (None, None) if self.update is None else (self.update.A, self.update.B)
        return [t for t in (*factors, self.bias, self.stretch) if t is not None and t.requires_grad]


class Kept(NamedTuple):
    """What dropout left: `mask` is True where x was kept, each kept value scaled by 1 / probability."""

    mask: Bool[Tensor, "rows in_"]
    probability: float

    def apply(self, x: Tensor) -> Tensor:
        return x * self.mask * (1 / self.probability)


@dataclass(frozen=True)
class Member:
    """One projection of a group: its columns in what is kept, of h and of its unstretched output, None where it has none."""

    weight: Float[Tensor, "out in_"] | Frozen
    bias: Float[Tensor, " out"] | None
    B: Float[Tensor, "out r"] | None
    scale: float
    learns_A: bool = False
    learns_B: bool = False
    learns_bias: bool = False
    stretch: Float[Tensor, " out"] | None = None
    learns_stretch: bool = False
    columns: slice | None = None
    unstretched: slice | None = None

    @property
    def learns(self) -> bool:
        return self.learns_A or self.learns_B or self.learns_bias or self.learns_stretch


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
        for p in projections:
            ready = p.cast if p.cast is not None and p.cast[0].dtype == dtype else None
            A, B = ready or ((None, None) if p.update is None else (p.update.A.to(dtype), p.update.B.to(dtype)))
            members.append(_member(p, B, dtype))
            if A is not None:
                As.append(A)
        stacked = None if not As else As[0] if len(As) == 1 else torch.cat(As)
        return cls(_placed(members), stacked, dropout if As else 0.0)

    @property
    def learns(self) -> bool:
        return any(m.learns for m in self.members)

    @property
    def learns_A(self) -> bool:
        return any(m.learns_A for m in self.members)

    def part(self, at: slice) -> Group:
        """The group of some neighbouring members alone."""
        members = self.members[at]
        columns = [m.columns for m in members if m.columns is not None]
        if self.A is None or not columns:
            return Group(members, None)
        return Group(_placed(members), self.A[columns[0].start : columns[-1].stop], self.dropout)

    def forward(
        self, x: Float[Tensor, "rows in_"], kept: Kept | None, onto: Float[Tensor, "rows out"] | None = None
    ) -> tuple[list[Tensor], Float[Tensor, "rows _"] | None]:
        """See `group_forward`."""
        h = None if self.A is None else sum_of_products([Term(kept.apply(x) if kept else x, self.A)])
        outputs = [_output(x, h, m, onto) for m in self.members]
        if h is None:
            return outputs, None
        learning = [y for y, m in zip(outputs, self.members, strict=True) if m.unstretched is not None]
        stretched = [_stretched(y, m, onto) for y, m in zip(outputs, self.members, strict=True)]
        return stretched, torch.cat([h, *learning], 1) if learning else h

    def backward(
        self,
        gradients: Sequence[Float[Tensor, "rows _"]],
        x: Float[Tensor, "rows in_"] | None,
        kept: Kept | None,
        h: Float[Tensor, "rows _"] | None,
        *,
        input_gradient: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `group_backward`."""
        unstretched = [
            dy if m.stretch is None else torch.mul(dy, m.stretch, out=torch.empty_like(dy))
            for dy, m in zip(gradients, self.members, strict=True)
        ]
        g = rank_gradient(unstretched, self) if self.A is not None and (self.learns_A or input_gradient) else None
        dA = None if g is None or x is None or not self.learns_A else crossed(g, kept.apply(x) if kept else x)
        dx = _into_input(unstretched, g, kept, self) if input_gradient else None
        learned: list[Tensor] = []
        for dy, du, m in zip(gradients, unstretched, self.members, strict=True):
            learned += learned_gradients(dy, du, h, dA, m)
        return dx, learned


def _member(p: Projection, B: Tensor | None, dtype: torch.dtype) -> Member:
    update, bias, stretch = p.update, p.bias, p.stretch
    return Member(
        weight=p.weight,
        bias=None if bias is None else bias.to(dtype),
        B=B,
        scale=0.0 if update is None else update.scale,
        learns_A=update is not None and update.A.requires_grad,
        learns_B=update is not None and update.B.requires_grad,
        learns_bias=bias is not None and bias.requires_grad,
        stretch=None if stretch is None else stretch.detach(),
        learns_stretch=stretch is not None and stretch.requires_grad,
    )


def _placed(members: Sequence[Member]) -> tuple[Member, ...]:
    """The members with their columns: all ranks first, then the unstretched outputs that a gradient needs."""
    found = list(members)
    rank = 0
    for i, m in enumerate(found):
        if m.B is not None:
            found[i] = replace(m, columns=slice(rank, rank := rank + m.B.shape[1]))
    end = rank
    for i, m in enumerate(found):
        if m.stretch is not None and m.learns_stretch:
            found[i] = replace(m, unstretched=slice(end, end := end + len(m.stretch)))
    return tuple(found)


def drop(x: Float[Tensor, "rows in_"], p: float) -> Kept | None:
    """Draw which values of x survive a dropout of probability p; None when all do."""
    return Kept(torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p), 1 - p) if p > 0 else None


def group_forward(
    x: Float[Tensor, "rows in_"], kept: Kept | None, group: Group, onto: Float[Tensor, "rows out"] | None = None
) -> tuple[list[Tensor], Float[Tensor, "rows _"] | None]:
    """The outputs (rows, out_i) of each member, and what to keep for the backward: h = x̃ Aᵀ, then unstretched outputs.

    Args:
        onto: the residual on top of which the output of a group of one comes.
    """
    return group.forward(x, kept, onto)


def _output(x: Tensor, h: Tensor | None, m: Member, onto: Tensor | None) -> Tensor:
    """x Wᵀ + b and the update's share, on top of a residual; without bias and residual where the rest is to be stretched."""
    terms = [Term(x, m.weight)]
    if h is not None and m.B is not None:
        terms.append(Term(h[:, m.columns], m.B, scale=m.scale))
    return sum_of_products(terms, m.bias, onto) if m.stretch is None else sum_of_products(terms)


def _stretched(u: Tensor, m: Member, onto: Tensor | None) -> Tensor:
    """c ⊙ u + b, multiplied in the stretch's own precision, on top of a residual."""
    if m.stretch is None:
        return u
    y = torch.mul(u, m.stretch, out=torch.empty_like(u))
    for more in (m.bias, onto):
        y = y if more is None else y.add_(more)
    return y


def group_backward(
    gradients: Sequence[Float[Tensor, "rows _"]],
    x: Float[Tensor, "rows in_"] | None,
    kept: Kept | None,
    h: Float[Tensor, "rows _"] | None,
    group: Group,
    *,
    input_gradient: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx (rows, in) and, member by member in the order of `Projection.learned`, dA (r, in), dB (out, r), dbias and dstretch (out,).

    Args:
        x: needed where some A learns.
        h: what `group_forward` kept.
    """
    return group.backward(gradients, x, kept, h, input_gradient=input_gradient)


def rank_gradient(gradients: Sequence[Tensor], group: Group) -> Float[Tensor, "rows ranks"]:
    """g = scale · du B of each member, side by side."""
    adapted = [(du, m.B, m.scale) for du, m in zip(gradients, group.members, strict=True) if m.B is not None]
    found = [sum_of_products([Term(du, B, as_read=True, scale=scale)]) for du, B, scale in adapted]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def learned_gradients(dy: Tensor, du: Tensor, h: Tensor | None, dA: Tensor | None, m: Member) -> list[Tensor]:
    """What one member learns, in the order of `Projection.learned`."""
    found = [dA[m.columns]] if m.learns_A and dA is not None else []
    if m.learns_B and h is not None:
        found.append(crossed(du, h[:, m.columns], m.scale))
    if m.learns_bias:
        found.append(dy.sum(0))
    if m.learns_stretch and m.stretch is not None and h is not None:
        found.append((dy.to(m.stretch.dtype) * h[:, m.unstretched]).sum(0))
    return found


def _into_input(gradients: Sequence[Tensor], g: Tensor | None, kept: Kept | None, group: Group) -> Tensor:
    terms = [Term(du, m.weight, as_read=True) for du, m in zip(gradients, group.members, strict=True)]
    if g is None or group.A is None:
        return sum_of_products(terms)
    if kept is None:
        return sum_of_products([*terms, Term(g, group.A, as_read=True)])
    return sum_of_products(terms).add_(kept.apply(sum_of_products([Term(g, group.A, as_read=True)])))


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
        needs_x = group.learns_A
        ctx.save_for_backward(x if needs_x else None, h, None if kept is None else kept.mask)
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
