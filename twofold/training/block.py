"""The fast path: a described decoder's forward over the rows of a batch, one node of autograd's graph a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twofold.base.batch import PackedBatch
from twofold.base.blocks import Block, Decoder
from twofold.functional.segments import AttentionPlan, plan_attention
from twofold.layers.block import Rows, run_block
from twofold.training.layout import Layout, lay_out


def asked_states(decoder: Decoder, layout: Layout, *, recompute: bool = False) -> Float[Tensor, "asked d"]:
    """The last block's output at the rows from which something is predicted, filler at the end.

    Args:
        decoder: the description of the model, its adapters included.
        recompute: gradient checkpointing: keep only each block's input and run it again in the backward.
    """
    device = cast(Tensor, decoder.norm.weight).device
    x = cast(Tensor, decoder.embedding(layout.token_ids.to(device)))
    angles = decoder.angles(x, layout.positions.to(device))
    asked = layout.asked.to(device)
    *plans, last_plan = plans_of(decoder, layout, x)
    *below, last = decoder.blocks
    for block, plan in zip(below, plans, strict=True):
        x = _run(decoder, block, x, Rows(angles[block.turning]), plan, recompute)
    return _run(decoder, last, x, Rows(angles[last.turning], asked), last_plan, recompute)


def all_states(decoder: Decoder, batch: PackedBatch) -> Float[Tensor, "tokens d"]:
    """The last block's output for every token of a packed batch."""
    every = replace(batch, predicting=torch.arange(batch.tokens), labels=batch.token_ids)
    layout = lay_out(every, share=False)
    return asked_states(decoder, layout)[: batch.tokens]


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
