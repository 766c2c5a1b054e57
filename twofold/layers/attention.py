"""LoRA over a frozen `nn.MultiheadAttention`: on its packed input projection and on its output projection.

The module multiplies by its weights itself, so there is no linear layer in it to wrap; PEFT therefore merges and unmerges both
weights in every forward. Here its forward is written out, with the places where it multiplies given to the fused
low-rank product. Torch sums in other orders, and in evaluation runs a kernel of its own, so the base alone and an adapter that
changes nothing agree to rounding.

PEFT 0.21.2 adds the update of the output projection twice (its `merge` adds it by hand and then asks the inner layer to), so the
same file means one B A here and two there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from twofold.errors import ConfigError
from twofold.layers.linear import LinearShare, combined, one_dropout
from twofold.layers.protocol import Share
from twofold.layers.weights import WeightsLayer
from twofold.lowrank.factors import LowRank, merged_weight
from twofold.lowrank.linear import Projection, group_product

IN, OUT = "in_proj_weight", "out_proj.weight"


class AttentionShare(Share):
    """One adapter's factors: of the input projection A (r, d), B (3d, r); of the output projection A (r, d), B (d, r)."""

    def __init__(self, into: LinearShare, out: LinearShare) -> None:
        super().__init__()
        self.into, self.out = into, out

    @property
    def dropout(self) -> float:
        return self.into.dropout

    def updates(self) -> tuple[LowRank, LowRank]:
        """Its updates of both projections, at the weight it is active with."""
        into, out = (LowRank(s.A, s.B, s.scale * self.weight_when_active) for s in (self.into, self.out))
        return into, out

    def saved(self, base: nn.Module) -> dict[str, Tensor]:
        inner = self.out.saved(base).items()
        return self.into.saved(base) | {f"base_layer.out_proj.{key}": value for key, value in inner}

    def load(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.into.load(base, tensors)
        prefix = "base_layer.out_proj."
        self.out.load(base, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


class Masks(NamedTuple):
    """What is added to the scores, (batch or 1, heads or 1, targets, sources), and whether torch's causal mask stands for it."""

    added: Tensor | None
    causal: bool


class LoraAttention(WeightsLayer):
    """Multi-head attention whose two projections are W0 + Σ weight · scale · B A over the active shares."""

    base: nn.MultiheadAttention

    @classmethod
    def from_base(cls, base: nn.Module) -> LoraAttention:
        """Wrap a frozen attention module; nothing is copied."""
        return cls(base)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """No, to `nn.TransformerEncoderLayer`: else it would run the base's weights in one kernel and never call this layer."""
        return not self.active()

    def _shares_now(self) -> list[AttentionShare]:
        return cast(list[AttentionShare], self.active())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: the output in the query's layout, and the attention weights if asked for."""
        named = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
        named |= {"average_attn_weights": average_attn_weights, "is_causal": is_causal}
        if not self.active():
            return cast(tuple[Tensor, Tensor | None], self.base(query, key, value, **named))
        if self.merged is not None or self.folding:
            return cast(tuple[Tensor, Tensor | None], self.run_merged(query, key, value, **named))
        batched = query.dim() == 3
        q, k, v = (self._batch_first(heads, batched) for heads in self._projected(query, key, value))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        masks = self._masks(q, k, attn_mask, key_padding_mask, is_causal and not need_weights)
        k, v, masks = self._extended(k, v, masks)
        mixed, weights = self._attend(q, k, v, masks, need_weights)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        y = self._out(mixed)
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if self.base.batch_first else y.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v, in one product where they come from one input."""
        whole = self._projection(0)
        if query is key and key is value:
            (y,) = group_product(query, [whole], self._dropout)
            return list(y.chunk(3, -1))
        parts = [_rows(whole, self.base.embed_dim, i) for i in range(3)]
        if key is value:
            (q,), (k, v) = group_product(query, parts[:1], self._dropout), group_product(key, parts[1:], self._dropout)
            return [q, k, v]
        inputs = zip((query, key, value), parts, strict=True)
        return [group_product(x, [part], self._dropout)[0] for x, part in inputs]

    def _projection(self, which: int) -> Projection:
        base = self.base
        weight, bias = ((base.in_proj_weight, base.in_proj_bias), (base.out_proj.weight, base.out_proj.bias))[which]
        return Projection(weight, bias, combined([s.updates()[which] for s in self._shares_now()]))

    @property
    def _dropout(self) -> float:
        return one_dropout(s.dropout for s in self._shares_now()) if self.training else 0.0

    def _batch_first(self, x: Tensor, batched: bool) -> Float[Tensor, "batch heads length head_dim"]:
        """(batch, heads, length, head_dim), whatever the layout of the input."""
        x = x[None] if not batched else x if self.base.batch_first else x.transpose(0, 1)
        heads: Tensor = x.unflatten(-1, (self.base.num_heads, -1))
        return heads.transpose(1, 2)

    def _masks(self, q: Tensor, k: Tensor, attention: Tensor | None, padding: Tensor | None, causal: bool) -> Masks:
        """Both masks as one that is added to the scores; True in a mask of truth values is left out of sight."""
        if causal and attention is None:
            raise ConfigError("is_causal only says that attn_mask is the causal one; give attn_mask too, as torch asks")
        if causal and padding is None:
            return Masks(None, True)
        added = None
        if attention is not None:
            added = _added(attention, q.dtype)
            added = added.view(len(q), -1, *added.shape[1:]) if added.dim() == 3 else added[None, None]
        if padding is not None:
            unseen = _added(padding, q.dtype)[:, None, None, :]
            added = unseen if added is None else added + unseen
        return Masks(added, False)

    def _extended(self, k: Tensor, v: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Masks]:
        """Keys and values with those that the module itself adds: learned ones, and zeros. Nothing hides them."""
        base, more = self.base, 0
        if base.bias_k is not None and base.bias_v is not None:
            learned = [b.view(1, base.num_heads, 1, -1).expand(len(k), -1, -1, -1) for b in (base.bias_k, base.bias_v)]
            k, v, more = torch.cat([k, learned[0]], 2), torch.cat([v, learned[1]], 2), 1
        if base.add_zero_attn:
            k, v, more = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), more + 1
        return k, v, masks if masks.added is None else Masks(F.pad(masks.added, (0, more)), False)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, need_weights: bool
    ) -> tuple[Float[Tensor, "batch targets d"], Float[Tensor, "batch heads targets sources"] | None]:
        dropout, weights = self.base.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * (q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if masks.added is None else scores + masks.added, -1), dropout)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, masks.added, dropout, masks.causal)
        return mixed.transpose(1, 2).flatten(2), weights

    def _out(self, mixed: Float[Tensor, "batch targets d"]) -> Float[Tensor, "batch targets d"]:
        found: Tensor = group_product(mixed, [self._projection(1)], self._dropout)[0]
        return found

    def changed(self) -> list[str]:
        return [IN, OUT]

    @torch.no_grad()
    def fold(self, name: str) -> Tensor:
        which = self.changed().index(name)
        return merged_weight(self.base.get_parameter(name), [s.updates()[which].delta() for s in self._shares_now()])


def _rows(whole: Projection, d: int, part: int) -> Projection:
    """A third of a packed projection."""
    rows = slice(part * d, (part + 1) * d)
    update = whole.update
    third = None if update is None else LowRank(update.A, update.B[rows], update.scale)
    return Projection(cast(Tensor, whole.weight)[rows], None if whole.bias is None else whole.bias[rows], third)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as something to add: truth values become minus infinity where they are true."""
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
