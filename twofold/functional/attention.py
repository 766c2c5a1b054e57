"""Causal self-attention over packed segments: no example sees another, and no token is padding in the products around it.

Layout. A batch is one flat row of tokens, its examples lying end to end. The linear layers see exactly those rows. Only
here are the segments brought side by side: segments of similar length form a *bucket*, padded on the right to the
bucket's longest. With padding on the right the causal mask alone is enough: a real query never reaches a padded key,
and padded queries are dropped on the way back.

Trade-off. On CPUs the fused attention kernels' backward runs far below its operation count, while short segments leave
the score matrices small. So short buckets use explicit batched products, with the query heads that share a key head
stacked as extra rows (keys are never repeated) and the probabilities kept for the backward; long buckets use PyTorch's
fused kernel, whose memory is linear. The gradient formulas are the usual ones (arXiv 2205.14135, appendix B):
dV = Pᵀ dO, dP = dO Vᵀ, dS = P ⊙ (dP - rowsum(dO ⊙ O)), dQ = s dS K, dK = s dSᵀ Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

EXPLICIT_UP_TO = 512
"""Bucket length to which explicit products are used."""
BUCKET_WASTE = 0.8
"""A segment joins a bucket when it is at least this share of the bucket's longest."""
LENGTH_MULTIPLE = 16
"""Buckets are padded to a multiple of this, so that kernels meet few lengths."""


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, padded to the longest.

    Attributes:
        segments: how many.
        gather: (segments * length,) the flat row of each place; a padded place repeats its segment's last row.
        places: (tokens,) the places that are tokens.
        tokens: (tokens,) the flat rows of those tokens.
        mask: (length, length) True where a query may not see a key; empty where the fused kernel knows by itself.
    """

    segments: int
    gather: Int[Tensor, " places"]
    places: Int[Tensor, " tokens"]
    tokens: Int[Tensor, " tokens"]
    mask: Bool[Tensor, "side side"]


def buckets(lengths: Sequence[int], device: torch.device | str) -> list[Bucket]:
    """Group the segments, whose rows lie end to end, by length."""
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += length
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] >= BUCKET_WASTE * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_bucket([starts[i] for i in g], [lengths[i] for i in g], device) for g in groups]


def _bucket(starts: list[int], lengths: list[int], device: torch.device | str) -> Bucket:
    longest = -(-max(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    offsets = torch.arange(longest)
    sizes = torch.tensor(lengths)[:, None]
    gather = (torch.tensor(starts)[:, None] + torch.minimum(offsets, sizes - 1)).flatten()
    places = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)])
    side = longest if longest <= EXPLICIT_UP_TO else 0
    mask = torch.ones(side, side, dtype=torch.bool).triu_(1)
    return Bucket(len(lengths), gather.to(device), places.to(device), gather[places].to(device), mask.to(device))


class _ToBucket(torch.autograd.Function):
    """(rows, heads, d) -> (segments, heads, length, d). No gradient ever reaches a padded place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bucket: Bucket) -> Tensor:
        ctx.bucket, ctx.shape = bucket, x.shape
        return x.index_select(0, bucket.gather).view(bucket.segments, -1, *x.shape[1:]).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        flat = gradients[0].transpose(1, 2).reshape(-1, *ctx.shape[1:])
        dx = flat.new_zeros(ctx.shape)
        return dx.index_copy_(0, ctx.bucket.tokens, flat.index_select(0, ctx.bucket.places)), None


class _FromBuckets(torch.autograd.Function):
    """The (segments, heads, length, d) of every bucket -> (rows, heads, d); rows of no segment are zero."""

    @staticmethod
    def forward(ctx: Any, rows: int, packed: Sequence[Bucket], *found: Tensor) -> Tensor:
        ctx.packed, ctx.shapes = packed, [f.shape for f in found]
        _, heads, _, d = found[0].shape
        out = found[0].new_zeros(rows, heads, d)
        for bucket, f in zip(packed, found, strict=True):
            flat = f.transpose(1, 2).reshape(-1, heads, d)
            out.index_copy_(0, bucket.tokens, flat.index_select(0, bucket.places))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (dy,) = gradients
        back = []
        for bucket, (segments, heads, length, d) in zip(ctx.packed, ctx.shapes, strict=True):
            flat = dy.new_zeros(segments * length, heads, d)
            flat.index_copy_(0, bucket.places, dy.index_select(0, bucket.tokens))
            back.append(flat.view(segments, length, heads, d).transpose(1, 2))
        return None, None, *back


def _explicit_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (S, K, G, L, D), k and v (S, K, L, D) -> output like q and the probabilities (S, K, G, L, L)."""
    s, kv, g, length, d = q.shape
    scores = torch.matmul(q.reshape(s, kv, g * length, d), k.transpose(-1, -2)).view(s, kv, g, length, length)
    wide = scores.to(torch.promote_types(q.dtype, torch.float32)).mul_(scale).masked_fill_(mask, float("-inf"))
    p = torch.softmax(wide, -1).to(q.dtype)
    return torch.matmul(p.view(s, kv, g * length, length), v).view_as(q), p


def _explicit_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    s, kv, g, length, d = q.shape
    flat_do, flat_p = do.reshape(s, kv, g * length, d), p.view(s, kv, g * length, length)
    dv = torch.matmul(flat_p.transpose(-1, -2), flat_do)
    dp = torch.matmul(flat_do, v.transpose(-1, -2))
    ds = torch.ops.aten._softmax_backward_data(dp, flat_p, -1, p.dtype).mul_(scale)
    dq = torch.matmul(ds, k).view_as(q)
    dk = torch.matmul(ds.transpose(-1, -2), q.reshape(s, kv, g * length, d))
    return dq, dk, dv


class _ExplicitAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        out, p = _explicit_forward(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, k, v, p = ctx.saved_tensors
        return *_explicit_backward(gradients[0], q, k, v, p, ctx.scale), None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scale: float) -> Tensor:
    """Attention inside one bucket: (segments, heads, length, d)."""
    segments, heads, length, d = q.shape
    kv_heads = k.shape[1]
    if length <= EXPLICIT_UP_TO:
        grouped = q.reshape(segments, kv_heads, heads // kv_heads, length, d)
        out: Tensor = _ExplicitAttention.apply(grouped, k.contiguous(), v.contiguous(), bucket.mask, scale)
        return out.view(q.shape)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=kv_heads != heads)


def packed_attention(
    q: Float[Tensor, "rows heads d"],
    k: Float[Tensor, "rows kv_heads d"],
    v: Float[Tensor, "rows kv_heads d"],
    packed: Sequence[Bucket],
    scale: float,
) -> Float[Tensor, "rows heads d"]:
    """Causal attention in which each query sees the keys of its own segment up to itself; rows of no segment give 0."""
    found = [_attend(_side_by_side(q, b), _side_by_side(k, b), _side_by_side(v, b), b, scale) for b in packed]
    out: Tensor = _FromBuckets.apply(q.shape[0], packed, *found)
    return out


def _side_by_side(x: Tensor, bucket: Bucket) -> Tensor:
    found: Tensor = _ToBucket.apply(x, bucket)
    return found


def cached_attention(
    q: Float[Tensor, "streams new heads d"],
    keys: Float[Tensor, "streams kv_heads seen d"],
    values: Float[Tensor, "streams kv_heads seen d"],
    positions: Int[Tensor, "streams new"],
    scale: float,
) -> Float[Tensor, "streams new heads d"]:
    """The newest queries of each stream over its own cache, each up to its own position."""
    streams, new, heads, d = q.shape
    may_see = torch.arange(keys.shape[2], device=q.device) <= positions[..., None]
    if new > 1:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, may_see[:, None], scale=scale, enable_gqa=heads != keys.shape[1]
        )
        return out.transpose(1, 2)
    grouped = q.view(streams, keys.shape[1], heads // keys.shape[1], d)
    scores = torch.matmul(grouped, keys.transpose(-1, -2))
    wide = scores.to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)
    p = torch.softmax(wide.masked_fill_(~may_see[:, None], float("-inf")), -1).to(q.dtype)
    return torch.matmul(p, values).view(streams, 1, heads, d)
