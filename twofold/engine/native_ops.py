"""The operations of a decoder by our own kernels, on the CPU: see native/kernels.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from twofold.base.blocks import Block, Decoder, norm_of
from twofold.engine.cache import SlotCache
from twofold.engine.given import Owners
from twofold.engine.laid import Laid, Place
from twofold.engine.merged import Hot
from twofold.engine.resident import Change, Resident, places, stretch_and_shift
from twofold.engine.step import Part, Wearing, Worn, wearing
from twofold.engine.weights import Matrix, Weights, form_of, give, packed_size
from twofold.events import Pieces
from twofold.functional.gated import ACTIVATIONS
from twofold.functional.norm import Norm
from twofold.functional.rope import Angles
from twofold.layers.linear import projection_of
from twofold.lowrank.factors import LowRank
from twofold.lowrank.linear import Projection
from twofold.machine import return_freed_memory
from twofold.native import kernels
from twofold.native.kernels import LAYER, PASS, SEGMENT, Kernels, Updates
from twofold.native.packed import WIDTH, Packed, Room, packed_bytes
from twofold.quant import Int8Weight

LAID_FROM = 16
"""Tokens of a part from which its attention is faster with its slot laid out than row by row."""

BETWEEN_RETURNS = 8
"""Places that are packed before the memory of those that were given up for them goes back to the system."""


class _Compiled(NamedTuple):
    """A resident as the kernels read it; `kept` are the packed factors that its addresses lie in."""

    segments: NDArray[Any]
    kept: list[Packed]

    @property
    def bytes(self) -> int:
        """Of the packed factors, filled up as they are."""
        return sum(len(p.bytes) for p in self.kept)


class NativeOps:
    """Weights packed once, and every operation over them.

    Args:
        owners: of the parameters that are given up for what is packed.
        merge_after: passes in a row with the same adapters after which these are folded into a second copy of the weights.
    """

    def __init__(self, decoder: Decoder, weights: Weights, owners: Owners, merge_after: int | None) -> None:
        self.decoder, self.kernels = decoder, Kernels(decoder.dtype)
        self.activation = next(i for name, i in kernels.ACTIVATIONS.items() if ACTIVATIONS[name] == decoder.activation)
        self.norms: dict[int, Norm] = {}
        self.laid = self._laid(_packed(decoder, weights, owners))
        self.hot = Hot(self.laid, merge_after)

    def begin(self, parts: Sequence[Part], angles: dict[str, Angles]) -> NativePass:
        """What all layers of one pass share."""
        wide = {kind: Angles(a.cos.float(), a.sin.float()) for kind, a in angles.items()}
        merged = self.hot.laid_for(parts)
        if merged is None:
            return NativePass(self, self.laid, parts, wearing(parts), wide)
        return NativePass(self, merged, parts, [], wide)

    def _laid(self, found: list[Place]) -> Laid:
        layers = np.zeros(len(self.decoder.blocks), LAYER)
        names = ("attention", "q", "k", "attention_post", "mlp", "mlp_post")
        for layer, block in zip(layers, self.decoder.blocks, strict=True):
            for name, module in zip(names, block.all_norms(), strict=True):
                if module is not None:
                    norm = self.wide(norm_of(module))
                    layer[name] = (norm.weight.data_ptr(), norm.eps)
            layer["window"] = block.window or 0
        return Laid.of(found, layers)

    def wide(self, norm: Norm) -> Norm:
        """A norm with its weight in float32."""
        found = self.norms.get(norm.weight.data_ptr())
        if found is None:
            found = self.norms[norm.weight.data_ptr()] = Norm(norm.weight.detach().float(), norm.eps)
        return found

    @property
    def merged(self) -> Worn:
        """What is folded into a second copy of the weights."""
        return self.hot.ready

    def preparing(self, resident: Resident) -> Pieces[None]:
        """Pack its factors."""
        resident.compiled["native"] = yield from _compiled(resident, len(self.laid.places))

    def forget(self, resident: Resident) -> None:
        """It is no longer there."""
        self.hot.forget(resident)

    def compiled(self, resident: Resident) -> _Compiled:
        """Its factors as they were packed."""
        found: _Compiled = resident.compiled["native"]
        return found


class NativePass:
    """One pass over some rows.

    Args:
        parts: the shortest first, so that rows taken one by one come before those of prompts.
        worn: the adapters that are not in the weights.
    """

    def __init__(
        self, ops: NativeOps, laid: Laid, parts: Sequence[Part], worn: list[Wearing], angles: dict[str, Angles]
    ) -> None:
        self.ops, self.laid, self.worn, self.angles = ops, laid, worn, angles
        counts = [len(p.tokens) for p in parts]
        self.rows_few = sum(c for c in counts if c < LAID_FROM)
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
        weight, bias, widths = self.laid.places[place]
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
        if len(turned) > 1 or any(w.resident.special for w in self.worn):
            return False
        decoder, layers = self.ops.decoder, self.laid.layers
        for layer, block in zip(layers, decoder.blocks, strict=True):
            angles = self.angles[block.turning]
            layer["cos"], layer["sin"] = angles.cos.data_ptr(), angles.sin.data_ptr()
        shared, updates = np.zeros((), PASS), self.updates
        counts = (decoder.heads.queries, decoder.heads.keys, decoder.head_dim, turned.pop())
        scale, softcap = decoder.scoring.scale, decoder.scoring.softcap or 0.0
        found = 0 if self.segments is None else self.segments.ctypes.data
        addresses = (self.at[0].data_ptr(), self.at[1].data_ptr(), found, updates.starts.ctypes.data)
        rest = (updates.rows.ctypes.data, updates.weights.ctypes.data, cache.keys.data_ptr(), cache.values.data_ptr())
        sizes = (len(x), self.rows_few, cache.capacity, cache.count, self.ops.activation, len(self.worn))
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
        seen = (self.at, keys, values)
        return ops.kernels.attention(qkv, heads, *seen, decoder.scoring, block.window, self.rows_few)


def _updates(worn: Sequence[Wearing]) -> Updates:
    starts = np.cumsum([0, *(len(w.rows) for w in worn)]).astype(np.int32)
    rows = np.array([r for w in worn for r in w.rows], np.int32)
    return Updates(starts, rows, np.array([v for w in worn for v in w.weights], np.float32))


def _packed(decoder: Decoder, weights: Weights, owners: Owners) -> list[Place]:
    room, form = Room(packed_size(decoder)), form_of(weights)
    found = []
    for i, group in enumerate(places(decoder)):
        found.append(_place([projection_of(m) for m in group], room, form, owners))
        if weights != "shared" and i % BETWEEN_RETURNS == 0:
            return_freed_memory()
    return found


def _place(group: Sequence[Projection], room: Room, form: Callable[[Matrix], Matrix], owners: Owners) -> Place:
    """Pack the projections of a place, and let their parameters stand for what was packed."""
    widths = _widths(group)
    packed = room.pack(form(_side_by_side([cast(Matrix, p.weight) for p in group])))
    for projection, width, end in zip(group, widths.tolist(), np.cumsum(widths).tolist(), strict=True):
        give(owners, projection, packed, end - width)
    return Place(packed, _biases(group), widths)


def _side_by_side(found: Sequence[Matrix]) -> Matrix:
    if len(found) == 1:
        return found[0]
    codes = [w for w in found if isinstance(w, Int8Weight)]
    if codes:
        packed, scale = torch.cat([w.packed for w in codes]), torch.cat([w.row_scale for w in codes])
        return Int8Weight(packed, packed.shape, codes[0].dtype, scale)
    return torch.cat([w.detach() for w in cast(Sequence[Tensor], found)])


def _widths(group: Sequence[Projection]) -> NDArray[np.int64]:
    return np.array([p.weight.shape[0] for p in group], np.int64)


def _biases(group: Sequence[Projection]) -> Float[Tensor, " out"] | None:
    if all(p.bias is None for p in group):
        return None
    like = next(p.bias for p in group if p.bias is not None).detach()
    return torch.cat([like.new_zeros(p.weight.shape[0]) if p.bias is None else p.bias.detach() for p in group])


def _compiled(resident: Resident, places: int) -> Pieces[_Compiled]:
    segments = np.zeros(places, SEGMENT)
    room, kept = Room(sum(_filled_size(group) for group in resident.changes.values())), []
    for place, group in sorted(resident.changes.items()):
        updates = [None if c is None else c.update for c in group]
        ranks = _ranks(group)
        if not ranks:
            continue
        yield
        segments[place]["ranks"] = ranks
        kept.append(room.pack(torch.cat([_filled(u, ranks, group) for u in updates])))
        segments[place]["a"] = kept[-1].address
        for i, update in enumerate(updates):
            if update is not None:
                yield
                kept.append(room.pack(torch.nn.functional.pad(update.B, (0, ranks - update.rank))))
                segments[place]["b"][i], segments[place]["scale"][i] = kept[-1].address, update.scale
    return _Compiled(segments, kept)


def _ranks(group: Sequence[Change | None]) -> int:
    """Of each member, filled up to what the kernels take."""
    updates = [c.update for c in group if c is not None and c.update is not None]
    return max((-(-u.rank // WIDTH) * WIDTH for u in updates), default=0)


def _filled_size(group: Sequence[Change | None]) -> int:
    """Bytes of a place's factors when they are packed."""
    updates = [c.update for c in group if c is not None and c.update is not None]
    if not updates:
        return 0
    (_, in_), ranks = updates[0].A.shape, _ranks(group)
    shapes = [(len(group) * ranks, in_), *((len(u.B), ranks) for u in updates)]
    return sum(packed_bytes(updates[0].A.new_empty(shape, device="meta")) for shape in shapes)


def _filled(update: LowRank | None, ranks: int, group: Sequence[Change | None]) -> Tensor:
    """A filled up with rows of zeros, all zeros where a member is not adapted."""
    like = next(c.update.A for c in group if c is not None and c.update is not None)
    if update is None:
        return like.new_zeros(ranks, like.shape[1])
    return torch.nn.functional.pad(update.A, (0, 0, 0, ranks - update.rank))
