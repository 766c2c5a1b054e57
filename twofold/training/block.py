"""The fast path: a described decoder's forward over packed rows, with hand-written gradients.

Embedding, blocks and norms run on exactly the tokens of the batch; attention keeps the examples apart; the output head
sees only the rows whose next token counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twofold.base.batch import PackedBatch
from twofold.base.blocks import Block, Decoder, normed
from twofold.functional.attention import Bucket, buckets, packed_attention
from twofold.functional.rope import rope
from twofold.functional.swiglu import swiglu
from twofold.layers.linear import project

ROW_MULTIPLE = 64
"""Rows are filled up to a multiple of this: kernels are prepared, and kept, for every number of rows that occurs, and
few numbers then occur. The filler belongs to no example: it attends to nothing and nothing attends to it."""


def hidden_states(decoder: Decoder, batch: PackedBatch, *, recompute: bool = False) -> Float[Tensor, "rows d"]:
    """The normed output of the last block for every token.

    Args:
        decoder: the description of the model, its adapters included.
        batch: the packed examples, on the model's device.
        recompute: gradient checkpointing: keep only each block's input and run it again in the backward.
    """
    filler = -batch.tokens % ROW_MULTIPLE
    x = cast(Tensor, decoder.embedding(F.pad(batch.token_ids, (0, filler))))
    angles = decoder.angles(x, F.pad(batch.positions, (0, filler)))
    packed = buckets(batch.lengths, x.device)
    for block in decoder.blocks:
        if recompute:
            x = cast(Tensor, checkpoint(run_block, decoder, block, x, angles, packed, use_reentrant=False))
        else:
            x = run_block(decoder, block, x, angles, packed)
    return normed(decoder.norm, x[: batch.tokens])


def run_block(
    decoder: Decoder, block: Block, x: Float[Tensor, "rows d"], angles: tuple[Tensor, Tensor], packed: Sequence[Bucket]
) -> Float[Tensor, "rows d"]:
    """One layer over packed rows."""
    q, k, v = project(normed(block.attention_norm, x), block.q, block.k, block.v)
    q = rope(decoder.heads(q, block.q_norm), *angles)
    k = rope(decoder.heads(k, block.k_norm), *angles)
    attended = packed_attention(q, k, v.view(k.shape), packed, decoder.attention_scale)
    x = x + project(attended.flatten(1), block.o)[0]
    gate, up = project(normed(block.mlp_norm, x), block.gate, block.up)
    return x + project(swiglu(gate, up), block.down)[0]
