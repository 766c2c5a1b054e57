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

from twofold.functional.fusing import fusible
from twofold.replaceable import replaceable

CHUNK_ELEMENTS = 1 << 24
"""Logits alive at once, in the type of the products."""
SLICE_ELEMENTS = 1 << 21
"""Logits widened at once on a CPU, where they then stay in its caches from one pass over them to the next."""
ROW_MULTIPLE = 32
"""Rows are filled up to a multiple of this, so that kernels meet few numbers of rows."""


class HeadLoss(NamedTuple):
    """Sum of the token losses (float32 or wider), and how many tokens were predicted right: no other has a larger logit."""

    loss_sum: Float[Tensor, ""]
    correct: Int[Tensor, ""]


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows per chunk: all chunks alike, and none with more logits than may be alive."""
    chunks = -(-rows * vocabulary // CHUNK_ELEMENTS)
    return -(-rows // (max(1, chunks) * ROW_MULTIPLE)) * ROW_MULTIPLE


@fusible
def _slice_loss(logits: Tensor, labels: Tensor, softcap: float | None, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss sum and correct count of some rows of wide logits; with `gradient` they are overwritten by theirs."""
    bent = None if softcap is None else torch.tanh(logits.div_(softcap))
    if bent is not None and softcap is not None:
        torch.mul(bent, softcap, out=logits)
    top = logits.amax(-1, keepdim=True)
    at = labels[:, None]
    picked = logits.gather(-1, at)
    correct = (picked == top).sum()
    exponentials = logits.sub_(top).exp_()
    total = exponentials.sum(-1, keepdim=True)
    loss = (total.log() + top - picked).sum()
    if gradient:
        exponentials.div_(total).scatter_add_(-1, at, torch.full_like(picked, -1.0))
        if bent is not None:
            exponentials.mul_(1 - bent.square())
    return loss, correct


@replaceable
def chunk_loss(
    logits: Float[Tensor, "rows vocabulary"], labels: Int[Tensor, " rows"], softcap: float | None, *, gradient: bool
) -> HeadLoss:
    """Of a chunk's logits, widened slice by slice; with `gradient` they are overwritten by theirs."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, SLICE_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    found = []
    for part, of_part in zip(logits.split(rows), labels.split(rows), strict=True):
        widened = part.to(wide)
        found.append(_slice_loss(widened, of_part, softcap, gradient=gradient))
        if gradient and widened is not part:
            part.copy_(widened)
    losses, correct = zip(*found, strict=True)
    return HeadLoss(torch.stack(losses).sum(), torch.stack(correct).sum())


@replaceable
def logits_of(hidden: Float[Tensor, "rows d"], head: Float[Tensor, "vocabulary d"]) -> Float[Tensor, "rows vocabulary"]:
    """hidden headᵀ."""
    return F.linear(hidden, head)


@replaceable
def hidden_gradient(
    dlogits: Float[Tensor, "rows vocabulary"], head: Float[Tensor, "vocabulary d"]
) -> Float[Tensor, "rows d"]:
    """dlogits head."""
    return torch.mm(dlogits, head)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses, correct = [], []
        rows = chunk_rows(len(hidden), len(head))
        for part, of_part, d in zip(
            hidden.split(rows), labels.split(rows), (hidden if gradient is None else gradient).split(rows), strict=True
        ):
            logits = logits_of(F.pad(part, (0, 0, 0, -len(part) % ROW_MULTIPLE)), head)
            loss, right = chunk_loss(logits[: len(part)], of_part, softcap, gradient=gradient is not None)
            losses.append(loss)
            correct.append(right)
            if gradient is not None:
                d.copy_(hidden_gradient(logits, head)[: len(part)])
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        total = torch.stack(correct).sum()
        ctx.mark_non_differentiable(total)
        return torch.stack(losses).sum(), total

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
    picked = wide.gather(-1, labels[:, None])
    return HeadLoss(F.cross_entropy(wide, labels, reduction="sum"), (picked == wide.amax(-1, keepdim=True)).sum())
