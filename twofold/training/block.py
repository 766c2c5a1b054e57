"""The fast path: a described decoder's forward over the rows of a batch, one node of autograd's graph a layer."""

from __future__ import annotations

import itertools
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twofold.base.batch import Example, PackedBatch, pack
from twofold.base.blocks import Block, Decoder
from twofold.functional.segments import AttentionPlan, plan_attention
from twofold.layers.block import Rows, run_block
from twofold.training.layout import Layout, lay_out, put


def asked_states(
    decoder: Decoder, layout: Layout, *, recompute: bool = False, trunk: Trunk | None = None
) -> Float[Tensor, "asked d"]:
    """The last block's output at the rows from which something is predicted, filler at the end.

    Args:
        decoder: the description of the model, its adapters included.
        recompute: gradient checkpointing: keep only each block's input and run it again in the backward.
        trunk: where the output of the lowest blocks comes from, if not from running them.
    """
    depth = 0 if trunk is None else trunk.depth
    x = _embedded(decoder, layout) if trunk is None else trunk.output(layout)
    angles = decoder.angles(x, layout.positions.to(x.device))
    asked = layout.asked.to(x.device)
    *plans, last_plan = plans_of(decoder, layout, x)
    *below, last = decoder.blocks
    for block, plan in zip(below[depth:], plans[depth:], strict=True):
        x = _run(decoder, block, x, Rows(angles[block.turning]), plan, recompute)
    return _run(decoder, last, x, Rows(angles[last.turning], asked), last_plan, recompute)


def _embedded(decoder: Decoder, layout: Layout) -> Float[Tensor, "rows d"]:
    device = cast(Tensor, decoder.norm.weight).device
    return cast(Tensor, decoder.embedding(layout.token_ids.to(device)))


class Trunk:
    """The output of a decoder's lowest blocks, which learn nothing, computed once for each example and then remembered.

    Every example is run alone, so that its bits do not depend on the batches in which it first occurs.

    Attributes:
        depth: how many blocks; 0 where the first already learns, or the embedding.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        embedding_learns = any(p.requires_grad for p in decoder.embedding.parameters())
        frozen = itertools.takewhile(lambda b: not decoder.tensors(b)[1], decoder.blocks[:-1])
        self.depth = 0 if embedding_learns else sum(1 for _ in frozen)
        self._known: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def output(self, layout: Layout) -> Float[Tensor, "rows d"]:
        """The trunk's output for the rows of a batch."""
        weight = cast(Tensor, self.decoder.norm.weight)
        x = weight.new_zeros(layout.rows, len(weight))
        for text, segment in zip(layout.texts, layout.own, strict=True):
            if len(text):
                put(x, self._states(text), segment)
        return x

    def _states(self, text: Tensor) -> Float[Tensor, "tokens d"]:
        key = tuple(text.tolist())
        if key not in self._known:
            self._known[key] = self._run_alone(text)
        return self._known[key]

    def _run_alone(self, text: Tensor) -> Float[Tensor, "tokens d"]:
        layout = lay_out(pack([Example(text.tolist(), [True] * len(text))]), share=False, whole=True)
        x = _embedded(self.decoder, layout)
        angles = self.decoder.angles(x, layout.positions.to(x.device))
        plans = plans_of(self.decoder, layout, x)
        for block, plan in zip(self.decoder.blocks[: self.depth], plans, strict=False):
            x = _run(self.decoder, block, x, Rows(angles[block.turning]), plan, recompute=False)
        return x[: len(text)].clone()


def all_states(decoder: Decoder, batch: PackedBatch) -> Float[Tensor, "tokens d"]:
    """The last block's output for every token of a packed batch."""
    return asked_states(decoder, lay_out(batch, share=False, whole=True))[: batch.tokens]


def plans_of(decoder: Decoder, layout: Layout, like: Tensor) -> list[AttentionPlan]:
    """Who attends to whom in each layer: one plan for all layers of a window, and the last layer's own."""

    def plan(block: Block, asked: Tensor | None = None) -> AttentionPlan:
        return plan_attention(layout.segments, layout.rows, decoder.heads, like, asked, block.window)

    *below, last = decoder.blocks
    by_window = {window: plan(block) for window, block in {b.window: b for b in below}.items()}
    return [*(by_window[b.window] for b in below), plan(last, layout.asked)]


def _run(decoder: Decoder, block: Block, x: Tensor, rows: Rows, plan: AttentionPlan, recompute: bool) -> Tensor:
    tensors, learned = decoder.tensors(block)
    if recompute and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(run_block, x, tensors, rows, plan, learned, use_reentrant=False))
    return run_block(x, tensors, rows, plan, learned)
