"""A decoder layer as one function: its forward, its gradient, and one node in autograd's graph.

    a = x + post(o(attention(q, k, v of norm(x))))          y = a + post(down(f(gate) · up of norm(a)))

with low-rank updates on any of the seven projections. What autograd would keep of this is several times what its gradient
needs. Kept here, a row: x, q, k and v as attention takes them, its output, a, gate and up, the rank columns of the updates, and
1 / rms of x and a. The normed inputs and the gated activation are cheap to compute again; the base's weights are only referred
to. No gradient is computed that nobody asks for: below the lowest adapted projection the backward stops.

The last layer of a model is only asked for some rows, those whose next token counts. Keys and values are needed of all rows,
but queries, the output projection and the MLP of the asked ones only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.functional.attention import Scoring, attention_backward, attention_forward
from twofold.functional.gated import Activation, gated, gated_backward
from twofold.functional.norm import Norm, normed, reciprocal_rms, rms_norm_backward, rms_norm_forward
from twofold.functional.rope import Angles, rotate
from twofold.functional.segments import AttentionPlan
from twofold.lowrank.linear import Group, Kept, drop, group_backward, group_forward, typed


@dataclass(frozen=True)
class BlockTensors:
    """One layer's tensors, in the type of the products, and how they are put together.

    Attributes:
        qkv, gate_up: groups of three and two members, or of one whose output holds them side by side.
        q_norm, k_norm: over each head, where the family has them.
        attention_post, mlp_post: norms of what is added to the residual, where the family has them.
    """

    attention_norm: Norm
    qkv: Group
    q_norm: Norm | None
    k_norm: Norm | None
    o: Group
    attention_post: Norm | None
    mlp_norm: Norm
    gate_up: Group
    down: Group
    mlp_post: Norm | None
    activation: Activation
    scoring: Scoring
    head_dim: int
    widths: tuple[int, int, int]

    def groups(self) -> tuple[Group, Group, Group, Group]:
        """In the order in which gradients are returned."""
        return self.qkv, self.o, self.gate_up, self.down


class Rows(NamedTuple):
    """Where a batch's rows stand.

    Attributes:
        angles: of every row.
        asked: the rows whose output is asked for, ascending, filler last; all when None.
    """

    angles: Angles
    asked: Int[Tensor, " queries"] | None = None

    def of_asked(self, x: Tensor) -> Tensor:
        """The asked rows of x."""
        return x if self.asked is None else x.index_select(0, self.asked)

    def asked_angles(self) -> Angles:
        return Angles(self.of_asked(self.angles.cos), self.of_asked(self.angles.sin))


class Saved(NamedTuple):
    """What a layer's backward needs besides its tensors; None where there is no such thing."""

    x: Tensor
    rho_x: Tensor
    q_raw: Tensor | None
    k_raw: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor
    o_raw: Tensor | None
    a: Tensor
    rho_a: Tensor
    gate: Tensor
    up: Tensor
    down_raw: Tensor | None
    h_q: Tensor | None
    h_qkv: Tensor | None
    h_o: Tensor | None
    h_gate_up: Tensor | None
    h_down: Tensor | None
    mask_qkv: Tensor | None
    mask_o: Tensor | None
    mask_gate_up: Tensor | None
    mask_down: Tensor | None


Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor | None]]]
"""From q (queries, heads, d), k and v (rows, key heads, d) to the output like q, and what its backward needs."""


def block_forward(
    x: Float[Tensor, "rows d"], t: BlockTensors, rows: Rows, attend: Attend
) -> tuple[Float[Tensor, "queries d"], Saved, list[Tensor | None]]:
    """The layer's output at the asked rows, and what the backward needs."""
    rho_x = reciprocal_rms(x, t.attention_norm)
    n = normed(x, rho_x, t.attention_norm)
    dropped = drop(n, t.qkv.dropout)
    q_raw, k_raw, v_raw, h_q, h_qkv = _qkv_forward(n, dropped, t, rows)
    q = rotate(_by_head(q_raw, t.q_norm, t), rows.asked_angles())
    k = rotate(_by_head(k_raw, t.k_norm, t), rows.angles)
    v = v_raw.reshape(k.shape).contiguous()  # of one fused projection it is a view, which would keep q and k as well
    out, kept = attend(q, k, v)
    attended = out.flatten(1)
    dropped_o = drop(attended, t.o.dropout)
    residual = rows.of_asked(x)
    (o,), h_o = group_forward(attended, dropped_o, t.o, residual if t.attention_post is None else None)
    a = o if t.attention_post is None else residual + rms_norm_forward(o, t.attention_post)
    rho_a = reciprocal_rms(a, t.mlp_norm)
    n = normed(a, rho_a, t.mlp_norm)
    dropped_gate_up = drop(n, t.gate_up.dropout)
    both, h_gate_up = group_forward(n, dropped_gate_up, t.gate_up)
    gate, up = both if len(both) == 2 else both[0].chunk(2, -1)
    product = gated(gate, up, t.activation)
    dropped_down = drop(product, t.down.dropout)
    (down,), h_down = group_forward(product, dropped_down, t.down, a if t.mlp_post is None else None)
    y = down if t.mlp_post is None else a + rms_norm_forward(down, t.mlp_post)
    saved = Saved(
        *(x, rho_x, q_raw if t.q_norm else None, k_raw if t.k_norm else None, q, k, v, attended),
        *(o if t.attention_post else None, a, rho_a, gate, up, down if t.mlp_post else None),
        *(h_q, h_qkv, h_o, h_gate_up, h_down),
        *(None if d is None else d.mask for d in (dropped, dropped_o, dropped_gate_up, dropped_down)),
    )
    return y, saved, kept


def _qkv_forward(
    n: Tensor, dropped: Kept | None, t: BlockTensors, rows: Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q at the asked rows, k and v at all; then the rank columns, those of q apart where it has rows of its own."""
    if rows.asked is None or len(t.qkv.members) == 1:
        found, h = group_forward(n, dropped, t.qkv)
        q, k, v = found if len(found) == 3 else found[0].split(t.widths, -1)
        return rows.of_asked(q), k, v, None, h
    asked = None if dropped is None else Kept(rows.of_asked(dropped.mask), dropped.probability)
    (q,), h_q = group_forward(rows.of_asked(n), asked, t.qkv.part(slice(0, 1)))
    (k, v), h = group_forward(n, dropped, t.qkv.part(slice(1, 3)))
    return q, k, v, h_q, h


def _by_head(x: Tensor, norm: Norm | None, t: BlockTensors) -> Float[Tensor, "rows heads d"]:
    heads = x.reshape(-1, t.head_dim)
    return (heads if norm is None else rms_norm_forward(heads, norm)).view(len(x), -1, t.head_dim)


def block_backward(
    dy: Float[Tensor, "queries d"],
    t: BlockTensors,
    rows: Rows,
    plan: AttentionPlan,
    saved: Saved,
    kept: list[Tensor | None],
    *,
    input_gradient: bool,
) -> tuple[Float[Tensor, "rows d"] | None, list[Tensor]]:
    """dx, and the gradients of what is learned, group by group."""
    into_attention = input_gradient or t.qkv.learns
    da, learned = _mlp_backward(dy, t, saved, below=into_attention or t.o.learns)
    if da is None:
        return None, learned
    do = da if t.attention_post is None else _norm_gradient(da, saved.o_raw, t.attention_post)
    dropped = _kept(saved.mask_o, t.o)
    dout, of_o = group_backward([do], saved.attended, dropped, saved.h_o, t.o, input_gradient=into_attention)
    learned = of_o + learned
    if dout is None:
        return None, learned
    q, k, v = saved.q, saved.k, saved.v
    dq, dk, dv = attention_backward(dout.view_as(q), q, k, v, kept, plan, t.scoring)
    dq = _head_gradient(rotate(dq, rows.asked_angles().back()), saved.q_raw, t.q_norm)
    dk = _head_gradient(rotate(dk, rows.angles.back()), saved.k_raw, t.k_norm)
    dn, of_qkv = _qkv_backward(dq, dk, dv.flatten(1), t, rows, saved, input_gradient=input_gradient)
    if dn is None:
        return None, of_qkv + learned
    dx = rms_norm_backward(dn, saved.x, saved.rho_x, t.attention_norm, da if rows.asked is None else None)
    return dx if rows.asked is None else dx.index_add_(0, rows.asked, da), of_qkv + learned


def _mlp_backward(
    dy: Tensor, t: BlockTensors, saved: Saved, *, below: bool
) -> tuple[Float[Tensor, "queries d"] | None, list[Tensor]]:
    """da, the gradient of the MLP's input and residual together, if anything below needs it."""
    into_mlp = below or t.gate_up.learns
    gate, up = saved.gate, saved.up
    product = gated(gate, up, t.activation)
    ddown = dy if t.mlp_post is None else _norm_gradient(dy, saved.down_raw, t.mlp_post)
    dropped = _kept(saved.mask_down, t.down)
    dproduct, of_down = group_backward([ddown], product, dropped, saved.h_down, t.down, input_gradient=into_mlp)
    if dproduct is None:
        return None, of_down
    gradients = gated_backward(dproduct, gate, up, t.activation)
    both = gradients if len(t.gate_up.members) == 2 else [torch.cat(gradients, -1)]
    n, dropped = normed(saved.a, saved.rho_a, t.mlp_norm), _kept(saved.mask_gate_up, t.gate_up)
    dn, of_gate_up = group_backward(both, n, dropped, saved.h_gate_up, t.gate_up, input_gradient=below)
    if dn is None:
        return None, of_gate_up + of_down
    return rms_norm_backward(dn, saved.a, saved.rho_a, t.mlp_norm, dy), of_gate_up + of_down


def _head_gradient(
    d: Float[Tensor, "rows heads d"], raw: Tensor | None, norm: Norm | None
) -> Float[Tensor, "rows width"]:
    """From the gradient of turned heads' input to that of the projection's output."""
    if norm is None or raw is None:
        return d.flatten(1)
    return _norm_gradient(d.flatten(0, 1), raw.reshape(-1, d.shape[-1]), norm).view(len(d), -1)


def _qkv_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, t: BlockTensors, rows: Rows, saved: Saved, *, input_gradient: bool
) -> tuple[Float[Tensor, "rows d"] | None, list[Tensor]]:
    """The gradient of the normed input, and of what q, k and v learn."""
    n, dropped = normed(saved.x, saved.rho_x, t.attention_norm), _kept(saved.mask_qkv, t.qkv)
    if rows.asked is None or len(t.qkv.members) == 1:
        dq = dq if rows.asked is None else dq.new_zeros(len(dk), dq.shape[1]).index_add_(0, rows.asked, dq)
        gradients = [dq, dk, dv] if len(t.qkv.members) == 3 else [torch.cat((dq, dk, dv), -1)]
        return group_backward(gradients, n, dropped, saved.h_qkv, t.qkv, input_gradient=input_gradient)
    asked = None if dropped is None else Kept(rows.of_asked(dropped.mask), dropped.probability)
    of_q, of_kv = t.qkv.part(slice(0, 1)), t.qkv.part(slice(1, 3))
    dn_q, first = group_backward([dq], rows.of_asked(n), asked, saved.h_q, of_q, input_gradient=input_gradient)
    dn, rest = group_backward([dk, dv], n, dropped, saved.h_qkv, of_kv, input_gradient=input_gradient)
    if dn is not None and dn_q is not None:
        dn.index_add_(0, rows.asked, dn_q)
    return dn, first + rest


def _kept(mask: Tensor | None, group: Group) -> Kept | None:
    return None if mask is None else Kept(mask, 1 - group.dropout)


def _norm_gradient(dy: Tensor, x: Tensor | None, norm: Norm) -> Tensor:
    if x is None:
        raise RuntimeError("a norm's input was not saved")
    return rms_norm_backward(dy, x, reciprocal_rms(x, norm), norm)


class _BlockFunction(torch.autograd.Function):
    """Autograd's door; what is learned is passed flat so that it sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: BlockTensors, rows: Rows, plan: AttentionPlan, *learned: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            return attention_forward(q, k, v, plan, t.scoring)

        y, saved, kept = block_forward(x, t, rows, attend)
        ctx.batch, ctx.dtypes = (t, rows, plan), [p.dtype for p in learned]
        ctx.save_for_backward(*saved, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        fields = len(Saved._fields)
        tensors = ctx.saved_tensors  # to be read once only, or checkpointing complains
        saved, kept = Saved(*tensors[:fields]), list(tensors[fields:])
        t, rows, plan = ctx.batch
        dx, found = block_backward(gradients[0], t, rows, plan, saved, kept, input_gradient=ctx.needs_input_grad[0])
        return dx, None, None, None, *typed(found, ctx.dtypes)


def run_block(
    x: Float[Tensor, "rows d"], t: BlockTensors, rows: Rows, plan: AttentionPlan, learned: Sequence[Tensor]
) -> Float[Tensor, "queries d"]:
    """One layer over packed rows, as one node of autograd's graph.

    Args:
        plan: who attends to whom.
        learned: what the groups learn, in their order: the tensors that `t` was cast from.
    """
    y: Tensor = _BlockFunction.apply(x, t, rows, plan, *learned)
    return y
