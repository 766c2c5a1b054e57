"""Cross-entropy through a frozen output head, in chunks, with the gradient formed in the forward pass.

Logits are the largest tensor of a fine-tuning step: (rows, vocabulary) in float32, several times over in the usual
loss. Here the rows are only the supervised ones, taken a chunk at a time: a chunk's logits become, in place, its
gradient softmax - onehot, which is multiplied back through the head at once. Two products in all, 4 V d operations a row,
no recomputation, and never more than one chunk of logits alive. The head is frozen, so it needs no gradient of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23
"""Logits alive at once: 32 MiB in float32."""
ROW_MULTIPLE = 32


class HeadLoss(NamedTuple):
    """Sum of the token losses (float32 or wider), and how many tokens were predicted right."""

    loss_sum: Float[Tensor, ""]
    correct: Int[Tensor, ""]


def chunk_rows(vocabulary: int) -> int:
    """Rows per chunk, so that a chunk's logits stay small."""
    rows = CHUNK_ELEMENTS // vocabulary
    return max(1, rows - rows % ROW_MULTIPLE)


def _chunk_loss(logits: Tensor, labels: Tensor, softcap: float | None, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss sum and correct count of one chunk; with `gradient`, logits (rows, V) are overwritten by theirs."""
    bent = None if softcap is None else torch.tanh(logits.div_(softcap))
    if bent is not None and softcap is not None:
        torch.mul(bent, softcap, out=logits)
    top = logits.max(-1, keepdim=True)
    at = labels[:, None]
    picked = logits.gather(-1, at)
    correct = (top.indices == at).sum()
    exponentials = logits.sub_(top.values).exp_()
    total = exponentials.sum(-1, keepdim=True)
    loss = (total.log() + top.values - picked).sum()
    if gradient:
        exponentials.div_(total).scatter_add_(-1, at, torch.full_like(picked, -1.0))
        if bent is not None:
            exponentials.mul_(1 - bent.square())
    return loss, correct


def _filled(hidden: Tensor) -> Tensor:
    """Rows filled up to a multiple with zeros, so that kernels meet few numbers of rows."""
    return F.pad(hidden, (0, 0, 0, -hidden.shape[0] % ROW_MULTIPLE))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        rows = chunk_rows(head.shape[0])
        for start in range(0, hidden.shape[0], rows):
            at = slice(start, min(start + rows, hidden.shape[0]))
            count = at.stop - start
            logits = F.linear(_filled(hidden[at]), head).to(wide)
            loss, right = _chunk_loss(logits[:count], labels[at], softcap, gradient=gradient is not None)
            loss_sum += loss
            correct += right
            if gradient is not None:
                gradient[at] = torch.mm(logits.to(head.dtype), head)[:count]
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        ctx.mark_non_differentiable(correct)
        return loss_sum, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None


def head_loss(
    hidden: Float[Tensor, "rows d"],
    head: Float[Tensor, "vocabulary d"],
    labels: Int[Tensor, " rows"],
    softcap: float | None = None,
) -> HeadLoss:
    """Sum over rows of -log softmax(logits)[label], with its gradient for `hidden` formed on the way; logits are hidden @ headᵀ,
    or c · tanh(hidden @ headᵀ / c) with a softcap of c (Gemma 2)."""
    return HeadLoss(*_HeadLoss.apply(hidden, head, labels, softcap))


def logits_loss(logits: Float[Tensor, "rows vocabulary"], labels: Int[Tensor, " rows"]) -> HeadLoss:
    """The same from logits that a model made itself, by autograd."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return HeadLoss(F.cross_entropy(wide, labels, reduction="sum"), (wide.argmax(-1) == labels).sum())
