"""The operations of a decoder by PyTorch's own, on any device; the other way is native_ops.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.base.blocks import Block, Decoder
from twofold.engine.cache import SlotCache
from twofold.engine.resident import Resident, stretch_and_shift
from twofold.engine.step import Part, Wearing, wearing
from twofold.functional.attention import cached_attention
from twofold.functional.gated import gated
from twofold.functional.norm import Norm, rms_norm_forward
from twofold.functional.rope import Angles, rotate
from twofold.lowrank.grouped import Spread, grouped_update
from twofold.lowrank.linear import Projection
from twofold.lowrank.products import Frozen, Term, sum_of_products


class _Alike(NamedTuple):
    """Parts that bring equally many tokens: streams side by side.

    Attributes:
        rows: where they are in the pass.
        each: tokens of each part.
        seen: places of a slot that some row of them looks at.
    """

    rows: slice
    each: int
    slots: list[int]
    seen: int


class TorchOps:
    """Weights as they are, and every operation over them."""

    def __init__(self, decoder: Decoder, weights: Sequence[Sequence[Projection]]) -> None:
        self.decoder, self.places = decoder, weights

    def prepare(self, resident: Resident) -> None:
        """Its factors are used as they are."""

    def begin(self, parts: Sequence[Part], angles: dict[str, Angles]) -> TorchPass:
        """What all layers of one pass share."""
        return TorchPass(self, parts, angles)


class TorchPass:
    """One pass over some rows."""

    def __init__(self, ops: TorchOps, parts: Sequence[Part], angles: dict[str, Angles]) -> None:
        self.ops, self.angles = ops, angles
        self.device = next(iter(angles.values())).cos.device
        self.worn = wearing(parts)
        self.rows = sum(len(p.tokens) for p in parts)
        self.spread = _spread(self.worn, self.rows, self.device)
        self.alike = _alike(parts)
        self.slots = torch.tensor([p.slot for p in parts for _ in p.tokens], device=self.device)
        self.at = torch.tensor([p.start + i for p in parts for i in range(len(p.tokens))], device=self.device)
        self.positions = [self.at[a.rows].view(len(a.slots), a.each) for a in self.alike]

    def linear(
        self, place: int, x: Float[Tensor, "rows in_"], onto: Float[Tensor, "rows out"] | None = None
    ) -> Float[Tensor, "rows out"]:
        """All projections of a place side by side, each row with what its adapters change."""
        group = self.ops.places[place]
        special = [w for w in self.worn if place in w.resident.special]
        found = [self._member(place, i, p, x, bias=not special) for i, p in enumerate(group)]
        y = found[0] if len(found) == 1 else torch.cat(found, -1)
        for one in special:
            stretch_and_shift(y, one.resident, place, [_width(p) for p in group], one.rows, one.weights)
        if special and any(p.bias is not None for p in group):
            y = y + torch.cat([y.new_zeros(_width(p)) if p.bias is None else p.bias for p in group]).to(y.dtype)
        return y if onto is None else onto + y

    def _member(self, place: int, member: int, p: Projection, x: Tensor, *, bias: bool) -> Tensor:
        y = sum_of_products([Term(x, p.weight)], p.bias if bias else None)
        changes = [(j, w.resident.changes.get(place)) for j, w in enumerate(self.worn)]
        updates = [(j, c[member].update) for j, c in changes if c is not None and c[member] is not None]  # type: ignore[union-attr]
        there = [(j, u) for j, u in updates if u is not None]
        if not there:
            return y
        return y + grouped_update(x, [u for _, u in there], self.spread.some([j for j, _ in there]))

    def layers(self, x: Float[Tensor, "rows d"], cache: SlotCache) -> bool:
        """There is no faster way for all layers at once."""
        return False

    def asked(self, rows: list[int]) -> None:
        """From now on only these rows of the pass are run, for the head."""
        self.worn = [w.of(rows) for w in self.worn]
        self.spread = _spread(self.worn, len(rows), self.device)

    def norm(self, x: Float[Tensor, "rows d"], norm: Norm) -> Float[Tensor, "rows d"]:
        return rms_norm_forward(x, norm)

    def gated(self, both: Float[Tensor, "rows two_d"]) -> Float[Tensor, "rows d"]:
        gate, up = both.chunk(2, -1)
        return gated(gate, up, self.ops.decoder.activation)

    def attention(
        self,
        qkv: Float[Tensor, "rows width"],
        block: Block,
        norms: tuple[Norm | None, Norm | None],
        cache: SlotCache,
        layer: int,
    ) -> Float[Tensor, "rows queries_d"]:
        """Keys and values into their slots, and each row's queries over its slot."""
        heads, d, angles = self.ops.decoder.heads, self.ops.decoder.head_dim, self.angles[block.turning]
        q, k, v = (t.unflatten(-1, (-1, d)) for t in qkv.split((heads.queries * d, heads.keys * d, heads.keys * d), -1))
        q, k = (rotate(_normed(t, norm), angles) for t, norm in zip((q, k), norms, strict=True))
        keys, values = cache.keys[layer], cache.values[layer]
        keys.transpose(1, 2)[self.slots, self.at] = k
        values.transpose(1, 2)[self.slots, self.at] = v
        found = [
            self._over_slots(q, keys, values, a, at, block) for a, at in zip(self.alike, self.positions, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _over_slots(
        self, q: Tensor, keys: Tensor, values: Tensor, some: _Alike, positions: Int[Tensor, "streams new"], block: Block
    ) -> Float[Tensor, "rows queries_d"]:
        first, streams = some.slots[0], len(some.slots)
        in_a_row = some.slots == list(range(first, first + streams))
        at = slice(first, first + streams) if in_a_row else some.slots
        asked = q[some.rows].unflatten(0, (streams, some.each))
        seen = (keys[at, :, : some.seen], values[at, :, : some.seen])
        out = cached_attention(asked, *seen, positions, self.ops.decoder.scoring, block.window)
        return out.flatten(0, 1).flatten(1)


def _normed(x: Float[Tensor, "rows heads d"], norm: Norm | None) -> Float[Tensor, "rows heads d"]:
    return x if norm is None else rms_norm_forward(x.flatten(0, 1), norm).view_as(x)


def _grouped(parts: Sequence[Part]) -> list[list[Part]]:
    """Neighbours that bring equally many tokens together."""
    found: list[list[Part]] = []
    for part in parts:
        if found and len(found[-1][0].tokens) == len(part.tokens):
            found[-1].append(part)
        else:
            found.append([part])
    return found


def _alike(parts: Sequence[Part]) -> list[_Alike]:
    found, row = [], 0
    for some in _grouped(parts):
        count = len(some[0].tokens)
        rows = slice(row, row + count * len(some))
        found.append(_Alike(rows, count, [p.slot for p in some], max(p.start for p in some) + count))
        row = rows.stop
    return found


def _spread(worn: Sequence[Wearing], rows: int, device: torch.device) -> Spread:
    table = torch.zeros(rows, len(worn))
    for j, one in enumerate(worn):
        table[one.rows, j] = torch.tensor(one.weights)
    return Spread(table.to(device), tuple(torch.tensor(one.rows, device=device) for one in worn))


def _width(p: Projection) -> int:
    weight: Tensor | Frozen = p.weight
    return weight.shape[0]
