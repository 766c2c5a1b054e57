"""Causal attention over the segments of a packed batch, and over a cache: forward and backward as plain functions.

Trade-off. On CPUs the fused attention kernels' backward runs far below its operation count, and a mask over packed rows wastes
most of it. Here everything is batched products: the segments of a bucket side by side, the query heads that share a key head
stacked as extra rows (keys are never repeated), a chunk of queries at a time against the keys up to its end. A chunk sees all
of its keys at once, so its softmax is an ordinary one. Where rows see few keys their probabilities are kept for the backward;
where many, they are computed again, so that memory grows with the tokens and not with their square.

The gradients are the usual ones (arXiv 2205.14135, appendix B): with P the probabilities, S the scaled scores,
dV = Pᵀ dO, dP = dO Vᵀ, dS = P ⊙ (dP - rowsum(dP ⊙ P)), dQ = s dS K, dK = s dSᵀ Q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.functional.segments import AttentionPlan, Bucket, Chunk
from twofold.replaceable import replaceable

KEEP_UP_TO = 512
"""Keys up to which a chunk's probabilities are kept for the backward."""


class Scoring(NamedTuple):
    """How scores come from products: scaled, then, in Gemma 2, bent by cap · tanh(score / cap)."""

    scale: float
    softcap: float | None = None


@replaceable
def attention_forward(
    q: Float[Tensor, "queries heads d"],
    k: Float[Tensor, "rows kv_heads d"],
    v: Float[Tensor, "rows kv_heads d"],
    plan: AttentionPlan,
    scoring: Scoring,
) -> tuple[Float[Tensor, "queries heads d"], list[Tensor | None]]:
    """Each query's output, filler's of no meaning, and the probabilities that are kept for the backward, chunk by chunk."""
    found: list[Tensor] = []
    kept: list[Tensor | None] = []
    for bucket in plan.buckets:
        qs, ks, vs = _gathered(q, k, v, bucket, plan, scoring)
        outputs = []
        for chunk in bucket.chunks:
            p = probabilities(_scores(qs, ks, chunk, scoring), chunk.mask)
            outputs.append(torch.bmm(p, vs[:, chunk.keys]))
            kept.append(p if p.shape[-1] <= KEEP_UP_TO else None)
        found.append(_joined(outputs, 1))
    return _from_places(found, plan.outputs, q), kept


@replaceable
def attention_backward(
    do: Float[Tensor, "queries heads d"],
    q: Float[Tensor, "queries heads d"],
    k: Float[Tensor, "rows kv_heads d"],
    v: Float[Tensor, "rows kv_heads d"],
    kept: list[Tensor | None],
    plan: AttentionPlan,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the gradient of the output; that of filler rows must be zero."""
    dqs, dks, dvs = [], [], []
    probabilities = iter(kept)
    for bucket in plan.buckets:
        dos = _to_places(do, bucket.queries, bucket, plan)
        known = [next(probabilities) for _ in bucket.chunks]
        dq, dk, dv = _bucket_backward(dos, *_gathered(q, k, v, bucket, plan, scoring), known, bucket, scoring)
        dqs.append(dq)
        dks.append(dk)
        dvs.append(dv)
    dq = _from_places(dqs, plan.outputs, q)
    return dq.mul_(scoring.scale), _key_gradient(dks, k, plan), _key_gradient(dvs, v, plan)


def _bucket_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, known: list[Tensor | None], bucket: Bucket, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a bucket's scaled queries, keys and values (batch, places, d)."""
    dqs, dks, dvs = [], [], []
    for chunk, kept in zip(bucket.chunks, known, strict=True):
        scores = _scores(q, k, chunk, scoring) if kept is None or scoring.softcap else None
        bent = scores.clone() if scoring.softcap and scores is not None else None
        p = probabilities(scores, chunk.mask) if kept is None and scores is not None else cast(Tensor, kept)
        doc, kc = do[:, chunk.queries], k[:, chunk.keys]
        dp = torch.bmm(doc, v[:, chunk.keys].transpose(1, 2))
        ds = scores_gradient(dp, p)
        if scoring.softcap and bent is not None:
            ds *= 1 - (bent / scoring.softcap).square()
        dqs.append(torch.bmm(ds, kc))
        dks.append(torch.bmm(ds.transpose(1, 2), q[:, chunk.queries]))
        dvs.append(torch.bmm(p.transpose(1, 2), doc))
    return _joined(dqs, 1), _summed(dks, bucket, k), _summed(dvs, bucket, v)


def probabilities(
    scores: Float[Tensor, "batch places keys"], mask: Float[Tensor, "_ places masked"]
) -> Float[Tensor, "batch places keys"]:
    """softmax(scores + mask), the mask over the last keys; the scores are overwritten."""
    if masked := mask.shape[-1]:
        scores[..., -masked:] += mask
    return torch.softmax(scores, -1)


def scores_gradient(
    dp: Float[Tensor, "batch places keys"], p: Float[Tensor, "batch places keys"]
) -> Float[Tensor, "batch places keys"]:
    """p ⊙ (dp - rowsum(dp ⊙ p)); dp may be overwritten."""
    found: Tensor = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
    return found


def _scores(q: Tensor, k: Tensor, chunk: Chunk, scoring: Scoring) -> Tensor:
    """(batch, places, keys) of a chunk, before the mask."""
    scores = torch.bmm(q[:, chunk.queries], k[:, chunk.keys].transpose(1, 2))
    if scoring.softcap:
        scores = torch.tanh(scores / scoring.softcap).mul_(scoring.softcap)
    return scores


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, plan: AttentionPlan, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """A bucket's queries, scaled, its keys and values, side by side: (segments * key heads, places, d)."""
    scaled = _to_places(q, bucket.queries, bucket, plan).mul_(scoring.scale)
    return scaled, _to_places(k, bucket.keys, bucket, plan), _to_places(v, bucket.keys, bucket, plan)


def _to_places(x: Tensor, places: Tensor, bucket: Bucket, plan: AttentionPlan) -> Tensor:
    d = x.shape[-1]
    return x.reshape(-1, d).index_select(0, places).view(bucket.segments * plan.heads.keys, -1, d)


def _from_places(found: list[Tensor], places: Tensor, like: Tensor) -> Tensor:
    """Back from the buckets' places to rows, shaped as `like`."""
    flat = _joined([f.reshape(-1, f.shape[-1]) for f in found], 0)
    return flat.index_select(0, places).view(like.shape)


def _key_gradient(found: list[Tensor], k: Tensor, plan: AttentionPlan) -> Tensor:
    """A row's gradient from its own segment, and that of a prefix from all segments that continue it."""
    rows = _from_places(found, plan.own_keys, k)
    for bucket, gradient in zip(plan.buckets, found, strict=True):
        if shared := bucket.prefix_length:
            seen = gradient.view(bucket.segments, plan.heads.keys, -1, k.shape[-1])[:, :, :shared]
            rows[bucket.prefix] += seen.sum(0).transpose(0, 1)
    return rows


def _summed(parts: list[Tensor], bucket: Bucket, like: Tensor) -> Tensor:
    """Each chunk's gradient of the keys that it saw, summed over the chunks in float32 or wider."""
    if len(parts) == 1 and parts[0].shape == like.shape:
        return parts[0]
    total = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
    for chunk, part in zip(bucket.chunks, parts, strict=True):
        total[:, chunk.keys] += part
    return total.to(like.dtype)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


@replaceable
def attention_products(
    plan: AttentionPlan, d: int, scoring: Scoring, operand: Callable[..., Tensor], *, backward: bool
) -> None:
    """The products of a forward, and of a backward, and nothing else: for a floor under their time.

    Args:
        operand: makes a matrix of a shape.
    """
    for bucket in plan.buckets:
        batch = bucket.segments * plan.heads.keys
        for chunk in bucket.chunks:
            q = operand(batch, chunk.queries.stop - chunk.queries.start, d)
            k = operand(batch, chunk.keys.stop - chunk.keys.start, d)
            scores = torch.bmm(q, k.transpose(1, 2))
            torch.bmm(scores, k)
            if not backward:
                continue
            again = k.shape[1] > KEEP_UP_TO or scoring.softcap
            for _ in range(2 if again else 1):  # dP, and the scores again where they were not kept, or not unbent
                torch.bmm(q, k.transpose(1, 2))
            torch.bmm(scores, k)  # dQ
            for _ in range(2):  # dK, dV
                torch.bmm(scores.transpose(1, 2), q)


def cached_attention(
    q: Float[Tensor, "streams new heads d"],
    keys: Float[Tensor, "streams kv_heads seen d"],
    values: Float[Tensor, "streams kv_heads seen d"],
    positions: Int[Tensor, "streams new"],
    scoring: Scoring,
    window: int | None = None,
) -> Float[Tensor, "streams new heads d"]:
    """The newest queries of each stream over its own cache, each up to its own position and as far back as `window`."""
    streams, new, _, d = q.shape
    at = torch.arange(keys.shape[2], device=q.device)
    may_see = at <= positions[..., None]
    if window is not None:
        may_see &= at > positions[..., None] - window
    grouped = q.view(streams, new, keys.shape[1], -1, d).permute(0, 2, 3, 1, 4)
    flat = grouped.reshape(streams, keys.shape[1], -1, d)
    scores = torch.matmul(flat, keys.transpose(-1, -2))
    wide = scores.to(torch.promote_types(q.dtype, torch.float32)).mul_(scoring.scale)
    if scoring.softcap:
        wide = torch.tanh(wide / scoring.softcap).mul_(scoring.softcap)
    seen = wide.view(*grouped.shape[:-1], -1).masked_fill_(~may_see[:, None, None], float("-inf"))
    p = torch.softmax(seen, -1).to(q.dtype).view_as(scores)
    return torch.matmul(p, values).view(grouped.shape).permute(0, 3, 1, 2, 4).reshape(q.shape)
