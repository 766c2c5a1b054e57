"""The forward passes of generation: over a described decoder, or through a model's own forward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.base.blocks import Block, Decoder, describe
from twofold.engine.cache import SlotCache
from twofold.functional.attention import cached_attention
from twofold.layers.block import Attend, BlockTensors, Rows, block_forward

SHARED_FROM = 16
"""Tokens that all prompts must have in common for their prefix to be computed once."""


@runtime_checkable
class StreamModel(Protocol):
    """Several streams that advance together, one token a step."""

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Float[Tensor, "streams vocabulary"]:
        """Take in the prompts; logits of each stream's next token."""
        ...

    def step(self, tokens: Sequence[int]) -> Float[Tensor, "streams vocabulary"]:
        """Take in one more token a stream; logits of the next."""
        ...

    def keep(self, streams: Sequence[int]) -> None:
        """Go on with these streams only."""
        ...


def stream_model(model: Any) -> StreamModel:
    """The fastest stream model that is right for this model."""
    described = describe(model)
    return BlockStreams(described) if isinstance(described, Decoder) else TransformersStreams(model)


class BlockStreams:
    """Streams over a described decoder, with a slot cache; a prefix common to all prompts is computed once."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.cache: SlotCache | None = None
        self.tensors: list[BlockTensors] = []

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Float[Tensor, "streams vocabulary"]:
        shared = common_prefix(prompts)
        self.tensors = [self.decoder.tensors(b)[0] for b in self.decoder.blocks]
        self.cache = self._new_cache(len(prompts), capacity)
        if shared:
            self._forward([prompts[0][:shared]], streams=1)
            self.cache.spread()
        return self._forward([p[shared:] for p in prompts], streams=len(prompts))

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Float[Tensor, "streams vocabulary"]:
        return self._forward([[t] for t in tokens], streams=len(tokens))

    def keep(self, streams: Sequence[int]) -> None:
        self._slots().keep(streams)

    def _slots(self) -> SlotCache:
        if self.cache is None:
            raise RuntimeError("start comes before step")
        return self.cache

    def _new_cache(self, streams: int, capacity: int) -> SlotCache:
        weight = cast(Tensor, self.decoder.norm.weight)
        blocks, d = self.decoder, self.decoder.head_dim
        return SlotCache(len(blocks.blocks), streams, blocks.heads.keys, capacity, d, weight.dtype, weight.device)

    def _forward(self, tokens: Sequence[Sequence[int]], streams: int) -> Float[Tensor, "streams vocabulary"]:
        """Run the first `streams` slots on; each may bring a different number of tokens, padded on the right."""
        cache = self._slots()
        device, before = cache.keys.device, cache.filled[:streams]
        counts = [len(t) for t in tokens]
        longest = max(counts)
        padded = torch.tensor([[*t, *([0] * (longest - len(t)))] for t in tokens], device=device)
        start = torch.tensor(before, device=device)
        positions = (start[:, None] + torch.arange(longest, device=device)).clamp_max(cache.keys.shape[3] - 1)
        x = cast(Tensor, self.decoder.embedding(padded)).flatten(0, 1)
        angles = self.decoder.angles(x, positions.flatten())
        seen = max(before) + longest
        for i, (block, tensors) in enumerate(zip(self.decoder.blocks, self.tensors, strict=True)):
            attend = self._attend(i, block, positions, seen)
            x, *_ = block_forward(x, tensors, Rows(angles[block.turning]), attend)
        cache.filled[:streams] = [b + c for b, c in zip(before, counts, strict=True)]
        ends = torch.tensor(counts, device=device) - 1
        last = x.view(streams, longest, -1)[torch.arange(streams, device=device), ends]
        return self.decoder.logits(last)

    def _attend(self, layer: int, block: Block, positions: Int[Tensor, "streams new"], seen: int) -> Attend:
        """Attention of one layer over the slots, which take in the newest keys and values first."""
        streams, new = positions.shape
        cache, decoder = self._slots(), self.decoder

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            by_stream = (streams, new, -1, decoder.head_dim)
            cache.write(layer, positions, k.view(by_stream), v.view(by_stream))
            keys, values = cache.keys[layer, :streams, :, :seen], cache.values[layer, :streams, :, :seen]
            out = cached_attention(q.view(by_stream), keys, values, positions, decoder.scoring, block.window)
            return out.reshape(q.shape), []

        return attend


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving each at least one of its own; 0 when too few to matter."""
    if len(prompts) < 2:
        return 0
    alike = (len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False))
    common = sum(1 for _ in itertools.takewhile(bool, alike))
    common = min(common, min(len(p) for p in prompts) - 1)
    return common if common >= SHARED_FROM else 0


class TransformersStreams:
    """Streams through a model's own forward and cache, prompts padded on the left."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.past: Any = None
        self.mask = torch.empty(0)

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Float[Tensor, "streams vocabulary"]:
        longest = max(len(p) for p in prompts)
        padded = [[0] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        self.mask = torch.tensor(mask, device=self.model.device)
        self.past = None
        return self._forward(torch.tensor(padded, device=self.model.device))

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Float[Tensor, "streams vocabulary"]:
        new = torch.tensor(tokens, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(new)], dim=1)
        return self._forward(new)

    def keep(self, streams: Sequence[int]) -> None:
        at = torch.tensor(list(streams), device=self.mask.device)
        self.mask = self.mask.index_select(0, at)
        self.past.batch_select_indices(at)

    def _forward(self, token_ids: Tensor) -> Tensor:
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)[:, -token_ids.shape[1] :]
        found = self.model(
            input_ids=token_ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.past,
            use_cache=True,
            logits_to_keep=1,
        )
        self.past = found.past_key_values
        logits: Tensor = found.logits[:, -1]
        return logits
