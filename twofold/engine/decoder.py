"""The forward pass of a described decoder over the rows of many streams, by one of two sets of operations.

Both sets do the same: on the CPU our own kernels where they can be compiled, PyTorch's operations everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.base.blocks import Block, Decoder, norm_of
from twofold.engine.cache import SlotCache
from twofold.engine.given import Owners
from twofold.engine.native_ops import NativeOps
from twofold.engine.resident import Reader, Resident, of_projections
from twofold.engine.step import Part, Worn, firsts, wearing
from twofold.engine.torch_ops import TorchOps
from twofold.engine.weights import Weights, groups_of, quantised_in_place, why_not_native
from twofold.errors import ConfigError
from twofold.events import Pieces, finished
from twofold.functional.norm import Norm
from twofold.functional.rope import Angles
from twofold.layers.tokens import TrainedTokens
from twofold.native.build import NotBuilt

IN: Mapping[Weights, str] = {"shared": "", "taken": "", "int8": ", weights in eight bits"}
"""What a path says of how the weights are held."""


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

    @property
    def merged(self) -> Worn: ...

    def preparing(self, resident: Resident) -> Pieces[None]: ...

    def forget(self, resident: Resident) -> None: ...

    def begin(self, parts: Sequence[Part], angles: dict[str, Angles]) -> Pass: ...


class BlockForward:
    """A described decoder with a cache, and the adapters that its streams have.

    Args:
        native: False leaves our own kernels aside.
        weights: how they are held.
        merge_after: passes in a row with the same adapters after which our own kernels fold these into a second copy.

    Attributes:
        alive: what adapters were active on the model when this was made; every stream has it.

    Raises:
        ConfigError: adapters are to be merged, by weights in eight bits or without our own kernels.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        streams: int,
        capacity: int,
        *,
        reuse: bool,
        native: bool,
        weights: Weights = "shared",
        merge_after: int | None = None,
    ) -> None:
        heads, like = decoder.heads.keys, cast(Tensor, decoder.norm.weight)
        self.slots = SlotCache(len(decoder.blocks), streams, heads, capacity, decoder.head_dim, like, reuse=reuse)
        self.decoder = decoder
        self.norms = [tuple(None if n is None else norm_of(n) for n in b.all_norms()) for b in decoder.blocks]
        self.final = norm_of(decoder.norm)
        self.operations, self.path = self._operations(model, weights, native, merge_after)
        groups = groups_of(decoder)
        self.reader = Reader(model, decoder, groups)
        self.alive: Resident | None = of_projections("as it stands", groups, decoder.dtype)
        if self.alive is not None:
            finished(self.operations.preparing(self.alive))

    def _operations(
        self, model: nn.Module, weights: Weights, native: bool, merge_after: int | None
    ) -> tuple[Operations, str]:
        reason = why_not_native(self.decoder) if native else "they were not asked for"
        owners = Owners(nn.Module() if weights == "shared" else model)
        if reason is None:
            try:
                return NativeOps(self.decoder, weights, owners, merge_after), f"our own kernels{IN[weights]}"
            except NotBuilt as why:
                reason = str(why)
        if merge_after is not None:
            raise ConfigError(
                f"only our own kernels merge adapters, and they do not run here ({reason}); leave out merge_after"
            )
        groups = quantised_in_place(self.decoder, owners) if weights == "int8" else groups_of(self.decoder)
        return TorchOps(self.decoder, groups), f"PyTorch's operations{IN[weights]}, not our own kernels: {reason}"

    @property
    def merged(self) -> tuple[str, ...]:
        return tuple(resident.key for resident, _ in self.operations.merged)

    def reading(self, key: str, folder: Path) -> Pieces[Resident]:
        resident = yield from self.reader.reading(key, folder)
        yield from self.operations.preparing(resident)
        return resident

    def check(self, worn: Worn) -> None:
        if len(worn) > 1 or any(weight != 1 for _, weight in worn):
            for resident, _ in worn:
                _check_sums(resident)

    def bytes_of(self, resident: Resident) -> int:
        return resident.bytes

    def drop(self, resident: Resident) -> None:
        """Nothing refers to it but the streams that wear it, and what it was folded into."""
        self.operations.forget(resident)

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
        head = self.decoder.head
        if isinstance(head, TrainedTokens) and head.active():
            logits = head.onto(logits, last)
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


def _check_sums(resident: Resident) -> None:
    if any(c is not None and c.stretch is not None for group in resident.changes.values() for c in group):
        raise ConfigError(
            f"adapter '{resident.key}' is DoRA, which sets the lengths of the rows itself, so it can be neither scaled nor "
            "summed with another; use it alone, at weight 1"
        )


def _added(now: Pass, place: int, x: Tensor, residual: Tensor, norm: Norm | None) -> Tensor:
    """A projection's output, normed where the family does that, on top of the residual."""
    if norm is None:
        return now.linear(place, x, residual)
    return residual + now.norm(now.linear(place, x), norm)


def _there(norm: Norm | None) -> Norm:
    if norm is None:
        raise RuntimeError("a decoder layer without its norm")
    return norm
