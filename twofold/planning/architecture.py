"""The sizes that a step's cost depends on: of the model, and of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from twofold.base.blocks import Decoder, describe
from twofold.errors import BaseError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a decoder that its activations depend on.

    Attributes:
        normed_twice: widths, in all, of products that a norm follows, so that a layer keeps them before and after it.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    q_width: int
    kv_width: int
    vocabulary: int
    normed_twice: int


def architecture(model: Any) -> Architecture:
    """The sizes of a transformers model.

    Raises:
        BaseError: it has no attention, so that what its layers cost is not known.
    """
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        raise BaseError(
            f"{type(model).__name__} has no attention heads, and what its layers cost is not known; choose a base with attention"
        )
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return Architecture(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        q_width=heads * head_dim,
        kv_width=kv_heads * head_dim,
        vocabulary=text.vocab_size,
        normed_twice=_normed_twice(model, (heads + kv_heads) * head_dim, text.hidden_size),
    )


def _normed_twice(model: Any, queries_and_keys: int, hidden: int) -> int:
    described = describe(model)
    if not isinstance(described, Decoder):
        return 0
    block = described.blocks[0]
    return (queries_and_keys if block.q_norm else 0) + hidden * sum(
        n is not None for n in (block.attention_post, block.mlp_post)
    )


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """One forward and backward pass: as many tokens as are computed, in examples of at most `length`, some supervised.

    Attributes:
        element_bytes: of a value in the base's type.
        recompute: gradient checkpointing.
    """

    tokens: int
    length: int
    supervised_tokens: int
    element_bytes: int
    recompute: bool
