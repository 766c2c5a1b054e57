"""The operations of a decoder by our own kernels, on the CPU: see native/kernels.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from twofold.base.blocks import Block, Decoder, norm_of
from twofold.engine.cache import SlotCache
from twofold.engine.resident import Change, Resident, stretch_and_shift
from twofold.engine.step import Part, Wearing, wearing
from twofold.functional.attention import cached_attention
from twofold.functional.gated import ACTIVATIONS
from twofold.functional.norm import Norm
from twofold.functional.rope import Angles
from twofold.lowrank.factors import LowRank
from twofold.lowrank.linear import Projection
from twofold.native import kernels
from twofold.native.kernels import LAYER, MEMBERS, PASS, SEGMENT, WIDTH, Kernels, Packed, Updates, packed_together

BY_PRODUCTS_FROM = 32
"""Tokens of a part from which attention by batched products is faster than row by row."""


class _Place(NamedTuple):
    """The projections of one place side by side."""

    weight: Packed
    bias: Tensor | None
    widths: NDArray[np.int64]


class _Compiled(NamedTuple):
    """A resident as the kernels read it; `kept` are the packed factors that its addresses lie in."""

    segments: NDArray[Any]
    kept: list[Packed]


class NativeOps:
    """Weights packed once, and every operation over them."""

    def __init__(self, decoder: Decoder, weights: Sequence[Sequence[Projection]]) -> None:
        self.decoder, self.kernels = decoder, Kernels(decoder.dtype)
        matrices = [_side_by_side(group) for group in weights]
        packed = packed_together(matrices)
        self.places = [_Place(p, _biases(g), _widths(g)) for p, g in zip(packed, weights, strict=True)]
        self.activation = next(i for name, i in kernels.ACTIVATIONS.items() if ACTIVATIONS[name] == decoder.activation)
        self.norms: dict[int, Norm] = {}
        self.layers = np.zeros(len(decoder.blocks), LAYER)
        for layer, block, i in zip(self.layers, decoder.blocks, range(len(decoder.blocks)), strict=True):
            self._lay_out(layer, block, self.places[4 * i : 4 * i + 4])

    def begin(self, parts: Sequence[Part], angles: dict[str, Angles]) -> NativePass:
        """What all layers of one pass share."""
        return NativePass(self, parts, {kind: Angles(a.cos.float(), a.sin.float()) for kind, a in angles.items()})

    def _lay_out(self, layer: Any, block: Block, places: Sequence[_Place]) -> None:
        """One layer's addresses."""
        names = ("attention", "q", "k", "attention_post", "mlp", "mlp_post")
        for name, module in zip(names, block.all_norms(), strict=True):
            if module is not None:
                norm = self.wide(norm_of(module))
                layer[name] = (norm.weight.data_ptr(), norm.eps)
        for name, (weight, bias, widths) in zip(("qkv", "o", "gate_up", "down"), places, strict=True):
            address = 0 if bias is None else bias.data_ptr()
            padded = np.pad(widths, (0, MEMBERS - len(widths)))
            layer[name] = (weight.address, address, weight.in_, weight.out, len(widths), padded)
        layer["window"] = block.window or 0

    def wide(self, norm: Norm) -> Norm:
        """A norm with its weight in float32."""
        found = self.norms.get(norm.weight.data_ptr())
        if found is None:
            found = self.norms[norm.weight.data_ptr()] = Norm(norm.weight.detach().float(), norm.eps)
        return found

    def prepare(self, resident: Resident) -> None:
        """Pack its factors."""
        resident.compiled["native"] = _compile(resident, len(self.places))

    def compiled(self, resident: Resident) -> _Compiled:
        """Its factors as they were packed."""
        found: _Compiled = resident.compiled["native"]
        return found


class NativePass:
    """One pass over some rows."""

    def __init__(self, ops: NativeOps, parts: Sequence[Part], angles: dict[str, Angles]) -> None:
        self.ops, self.parts, self.angles = ops, parts, angles
        self.worn = wearing(parts)
        counts = [len(p.tokens) for p in parts]
        self.rows_few = sum(c for c in counts if c < BY_PRODUCTS_FROM)
        slots = np.repeat([p.slot for p in parts], counts)
        positions = np.concatenate([np.arange(p.start, p.start + c) for p, c in zip(parts, counts, strict=True)])
        self.at = (torch.from_numpy(slots.astype(np.int32)), torch.from_numpy(positions.astype(np.int32)))
        self.updates, self.segments = _updates(self.worn), None
        self.changed = frozenset[int]().union(*(w.resident.changes for w in self.worn))
        if self.worn:
            found = [ops.compiled(w.resident).segments for w in self.worn]
            self.segments = np.ascontiguousarray(np.stack(found, 1))

    def linear(
        self, place: int, x: Float[Tensor, "rows in_"], onto: Float[Tensor, "rows out"] | None = None
    ) -> Float[Tensor, "rows out"]:
        """All projections of a place side by side, each row with what its adapters change."""
        weight, bias, widths = self.ops.places[place]
        updates = None
        if place in self.changed and self.segments is not None:
            updates = (self.updates, self.segments[place], widths)
        special = [w for w in self.worn if place in w.resident.special]
        if not special:
            return self.ops.kernels.linear(x, weight, bias, onto, updates)
        y = self.ops.kernels.linear(x, weight, None, None, updates)
        for one in special:
            stretch_and_shift(y, one.resident, place, widths.tolist(), one.rows, one.weights)
        y = y if bias is None else y + bias
        return y if onto is None else onto.add_(y)

    def layers(self, x: Float[Tensor, "rows d"], cache: SlotCache) -> bool:
        """All layers at once, in place, if nothing in this pass needs an operation beyond the kernels'."""
        turned = {a.cos.shape[-1] for a in self.angles.values()}
        if self.rows_few < len(x) or len(turned) > 1 or any(w.resident.special for w in self.worn):
            return False
        decoder, layers = self.ops.decoder, self.ops.layers
        for layer, block in zip(layers, decoder.blocks, strict=True):
            angles = self.angles[block.turning]
            layer["cos"], layer["sin"] = angles.cos.data_ptr(), angles.sin.data_ptr()
        shared, updates = np.zeros((), PASS), self.updates
        counts = (decoder.heads.queries, decoder.heads.keys, decoder.head_dim, turned.pop())
        scale, softcap = decoder.scoring.scale, decoder.scoring.softcap or 0.0
        found = 0 if self.segments is None else self.segments.ctypes.data
        addresses = (self.at[0].data_ptr(), self.at[1].data_ptr(), found, updates.starts.ctypes.data)
        rest = (updates.rows.ctypes.data, updates.weights.ctypes.data, cache.keys.data_ptr(), cache.values.data_ptr())
        sizes = (len(x), cache.capacity, cache.count, self.ops.activation, len(self.worn))
        shared[()] = (*counts, *sizes, scale, softcap, *addresses, *rest)
        self.ops.kernels.layers(layers, shared, x)
        return True

    def asked(self, rows: list[int]) -> None:
        """From now on only these rows of the pass are run, for the head."""
        self.worn = [w.of(rows) for w in self.worn]
        self.updates = _updates(self.worn)

    def norm(self, x: Float[Tensor, "rows d"], norm: Norm) -> Float[Tensor, "rows d"]:
        return self.ops.kernels.rms_norm(x, self.ops.wide(norm))

    def gated(self, both: Float[Tensor, "rows two_d"]) -> Float[Tensor, "rows d"]:
        return self.ops.kernels.gated(both, self.ops.activation)

    def attention(
        self,
        qkv: Float[Tensor, "rows width"],
        block: Block,
        norms: tuple[Norm | None, Norm | None],
        cache: SlotCache,
        layer: int,
    ) -> Float[Tensor, "rows queries_d"]:
        """Keys and values into their slots, and each row's queries over its slot."""
        ops, decoder = self.ops, self.ops.decoder
        angles, keys, values = self.angles[block.turning], cache.keys[layer], cache.values[layer]
        counts = (decoder.heads.queries, decoder.heads.keys, decoder.head_dim, angles.cos.shape[-1])
        heads = np.array(counts, np.int64)
        wide = [None if n is None else ops.wide(n) for n in norms]
        ops.kernels.rotary(qkv, heads, angles, wide, self.at, keys, values)
        few, at = qkv[: self.rows_few], (self.at[0][: self.rows_few], self.at[1][: self.rows_few])
        out = ops.kernels.attention(few, heads, at, keys, values, decoder.scoring, block.window)
        return out if len(few) == len(qkv) else torch.cat([out, *self._long(qkv, keys, values, block)])

    def _long(self, qkv: Tensor, keys: Tensor, values: Tensor, block: Block) -> list[Tensor]:
        """Attention of the parts of many tokens, one after the other."""
        first, decoder, found = self.rows_few, self.ops.decoder, []
        for part in (p for p in self.parts if len(p.tokens) >= BY_PRODUCTS_FROM):
            end, at = part.start + len(part.tokens), slice(part.slot, part.slot + 1)
            q = qkv[None, first : first + len(part.tokens), : decoder.heads.queries * decoder.head_dim]
            q = q.reshape(1, len(part.tokens), decoder.heads.queries, decoder.head_dim)
            positions = torch.arange(part.start, end)[None]
            seen = (keys[at, :, :end], values[at, :, :end])
            found.append(cached_attention(q, *seen, positions, decoder.scoring, block.window).flatten(2)[0])
            first += len(part.tokens)
        return found


def _updates(worn: Sequence[Wearing]) -> Updates:
    starts = np.cumsum([0, *(len(w.rows) for w in worn)]).astype(np.int32)
    rows = np.array([r for w in worn for r in w.rows], np.int32)
    return Updates(starts, rows, np.array([v for w in worn for v in w.weights], np.float32))


def _side_by_side(group: Sequence[Projection]) -> Float[Tensor, "out in_"]:
    matrices = [p.weight.detach() for p in group if isinstance(p.weight, Tensor)]
    return torch.cat(matrices) if len(matrices) > 1 else matrices[0]


def _widths(group: Sequence[Projection]) -> NDArray[np.int64]:
    return np.array([p.weight.shape[0] for p in group], np.int64)


def _biases(group: Sequence[Projection]) -> Float[Tensor, " out"] | None:
    if all(p.bias is None for p in group):
        return None
    like = next(p.bias for p in group if p.bias is not None).detach()
    return torch.cat([like.new_zeros(p.weight.shape[0]) if p.bias is None else p.bias.detach() for p in group])


def _compile(resident: Resident, places: int) -> _Compiled:
    segments = np.zeros(places, SEGMENT)
    matrices: list[Tensor] = []
    where: list[tuple[int, str, int]] = []
    for place, group in sorted(resident.changes.items()):
        updates = [None if c is None else c.update for c in group]
        ranks = max((-(-u.rank // WIDTH) * WIDTH for u in updates if u is not None), default=0)
        if not ranks:
            continue
        segments[place]["ranks"] = ranks
        matrices.append(torch.cat([_filled(u, ranks, group) for u in updates]))
        where.append((place, "a", 0))
        for i, update in enumerate(updates):
            if update is not None:
                matrices.append(torch.nn.functional.pad(update.B, (0, ranks - update.rank)))
                where.append((place, "b", i))
                segments[place]["scale"][i] = update.scale
    kept = packed_together(matrices) if matrices else []
    for packed, (place, name, member) in zip(kept, where, strict=True):
        if name == "a":
            segments[place]["a"] = packed.address
        else:
            segments[place]["b"][member] = packed.address
    return _Compiled(segments, kept)


def _filled(update: LowRank | None, ranks: int, group: Sequence[Change | None]) -> Tensor:
    """A filled up with rows of zeros, all zeros where a member is not adapted."""
    like = next(c.update.A for c in group if c is not None and c.update is not None)
    if update is None:
        return like.new_zeros(ranks, like.shape[1])
    return torch.nn.functional.pad(update.A, (0, 0, 0, ranks - update.rank))
