"""The forward pass of a described decoder over the rows of many streams, by one of two sets of operations.

Both sets do the same: on the CPU our own kernels where they can be compiled, PyTorch's operations everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.base.blocks import Block, Decoder, norm_of
from twofold.engine.cache import SlotCache
from twofold.engine.native_ops import NativeOps
from twofold.engine.resident import Reader, Resident, of_projections, places
from twofold.engine.step import Part, firsts, wearing
from twofold.engine.torch_ops import TorchOps
from twofold.functional.norm import Norm
from twofold.functional.rope import Angles
from twofold.layers.linear import projection_of
from twofold.lowrank.linear import Projection
from twofold.native.build import NotBuilt
from twofold.native.kernels import DTYPES, WIDTH


@runtime_checkable
class Pass(Protocol):
    """The operations over the rows of one pass."""

    def layers(self, x: Tensor, cache: SlotCache) -> bool: ...

    def linear(self, place: int, x: Tensor, onto: Tensor | None = None) -> Tensor: ...

    def norm(self, x: Tensor, norm: Norm) -> Tensor: ...

    def gated(self, both: Tensor) -> Tensor: ...

    def attention(
        self, qkv: Tensor, block: Block, norms: tuple[Norm | None, Norm | None], cache: SlotCache, layer: int
    ) -> Tensor: ...

    def asked(self, rows: list[int]) -> None: ...


@runtime_checkable
class Operations(Protocol):
    """What makes a pass."""

    def prepare(self, resident: Resident) -> None: ...

    def begin(self, parts: Sequence[Part], angles: dict[str, Angles]) -> Pass: ...


def weights_of(decoder: Decoder) -> list[list[Projection]]:
    """Every projection as it stands now, by place and member."""
    return [[projection_of(m) for m in group] for group in places(decoder)]


def why_not_native(decoder: Decoder, weights: Sequence[Sequence[Projection]]) -> str | None:
    """What keeps our own kernels from running this decoder, if anything does, compiling them aside."""
    found = [p.weight for group in weights for p in group]
    if any(not isinstance(w, Tensor) for w in found):
        return "the base is quantised"
    if any(w.device.type != "cpu" for w in cast(list[Tensor], found)):
        return "the base is not on the CPU"
    if decoder.dtype not in DTYPES or any(cast(Tensor, w).dtype != decoder.dtype for w in found):
        return f"the base is in {decoder.dtype}"
    if decoder.head_dim % WIDTH or any(cast(Tensor, w).shape[1] % WIDTH for w in found):
        return f"its widths are not multiples of {WIDTH}"
    return None


class BlockForward:
    """A described decoder with a cache, and the adapters that its streams have.

    Args:
        native: False leaves our own kernels aside.

    Attributes:
        alive: what adapters were active on the model when this was made; every stream has it.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, streams: int, capacity: int, *, reuse: bool, native: bool
    ) -> None:
        heads, like = decoder.heads.keys, cast(Tensor, decoder.norm.weight)
        self.slots = SlotCache(len(decoder.blocks), streams, heads, capacity, decoder.head_dim, like, reuse=reuse)
        self.decoder, self.weights = decoder, weights_of(decoder)
        self.reader = Reader(model, decoder, self.weights)
        self.norms = [tuple(None if n is None else norm_of(n) for n in b.all_norms()) for b in decoder.blocks]
        self.final = norm_of(decoder.norm)
        self.operations, self.path = self._operations(native)
        self.alive: Resident | None = of_projections("as it stands", self.weights, decoder.dtype)
        if self.alive is not None:
            self.operations.prepare(self.alive)

    def _operations(self, native: bool) -> tuple[Operations, str]:
        reason = why_not_native(self.decoder, self.weights) if native else "they were not asked for"
        if reason is None:
            try:
                return NativeOps(self.decoder, self.weights), "our own kernels"
            except NotBuilt as why:
                reason = str(why)
        return TorchOps(self.decoder, self.weights), f"PyTorch's operations, not our own kernels: {reason}"

    def read(self, key: str, folder: Path) -> Resident:
        resident = self.reader.read(key, folder)
        self.operations.prepare(resident)
        return resident

    def drop(self, resident: Resident) -> None:
        """Nothing refers to it but the streams that wear it."""

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> Float[Tensor, "asked vocabulary"]:
        if self.alive is not None:
            parts = [p._replace(worn=((self.alive, 1.0), *p.worn)) for p in parts]
        device = self.slots.keys.device
        ids = torch.tensor([t for p in parts for t in p.tokens], device=device)
        positions = torch.tensor([p.start + i for p in parts for i in range(len(p.tokens))], device=device)
        x = self._embedded(ids, parts)
        now = self.operations.begin(parts, self.decoder.angles(x, positions))
        if not now.layers(x, self.slots):
            for i, block in enumerate(self.decoder.blocks):
                x = self._block(now, i, block, x)
        for part in parts:
            self.slots.extend(part.slot, part.tokens)
        asked = [first + len(p.tokens) - 1 for p, first in zip(parts, firsts(parts), strict=True) if p.asked]
        if not asked:
            return x.new_empty(0, 0)
        now.asked(asked)
        last = now.norm(x[torch.tensor(asked, device=device)], self.final)
        logits = now.linear(4 * len(self.decoder.blocks), last)
        cap = self.decoder.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _embedded(self, ids: Tensor, parts: Sequence[Part]) -> Float[Tensor, "rows d"]:
        x = cast(Tensor, self.decoder.embedding(ids))
        for one in wearing(parts):
            if (update := one.resident.tokens) is not None:
                rows = torch.tensor(one.rows, device=x.device)
                weights = torch.tensor(one.weights, device=x.device)[:, None] * update.scale
                added = (update.A.T[ids[rows]] @ update.B.T) * weights
                x = x.index_add(0, rows, added.to(x.dtype))
        return x

    def _block(self, now: Pass, layer: int, block: Block, x: Tensor) -> Tensor:
        before, q_norm, k_norm, attention_post, between, mlp_post = self.norms[layer]
        qkv = now.linear(4 * layer, now.norm(x, _there(before)))
        attended = now.attention(qkv, block, (q_norm, k_norm), self.slots, layer)
        x = _added(now, 4 * layer + 1, attended, x, attention_post)
        both = now.linear(4 * layer + 2, now.norm(x, _there(between)))
        return _added(now, 4 * layer + 3, now.gated(both), x, mlp_post)


def _added(now: Pass, place: int, x: Tensor, residual: Tensor, norm: Norm | None) -> Tensor:
    """A projection's output, normed where the family does that, on top of the residual."""
    if norm is None:
        return now.linear(place, x, residual)
    return residual + now.norm(now.linear(place, x), norm)


def _there(norm: Norm | None) -> Norm:
    if norm is None:
        raise RuntimeError("a decoder layer without its norm")
    return norm
