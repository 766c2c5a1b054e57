"""One description of a decoder: which modules are its projections, norms and rotary embedding.

The fast training path and the engine read the same description and run the same functions over it. A model is described
only when every module in it does exactly what those functions do: known classes, no hooks, no patched forward. For any
other model there is a sentence that says why, and the plain path through the model's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from twofold.functional.norm import rms_norm
from twofold.layers.linear import LoraLinear
from twofold.layers.protocol import AdapterLayer


@dataclass(frozen=True)
class Block:
    """One layer: x += o(attention(q, k, v of norm(x))); x += down(silu(gate) up of norm(x))."""

    attention_norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None


@dataclass(frozen=True)
class Decoder:
    """A decoder in the Llama structure: embedding, blocks, norm, head; grouped heads, rotary positions, RMSNorm."""

    embedding: nn.Module
    blocks: tuple[Block, ...]
    norm: nn.Module
    head: nn.Module
    rotary: nn.Module
    head_dim: int
    kv_heads: int
    attention_scale: float

    def angles(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (rows, head_dim / 2) of the rotary embedding at `positions` (rows,)."""
        cos, sin = self.rotary(like[None], positions[None])
        half = self.head_dim // 2
        return cos[0, :, :half], sin[0, :, :half]

    def heads(self, x: Float[Tensor, "rows width"], norm: nn.Module | None) -> Float[Tensor, "rows heads d"]:
        """A projection's output by heads, each normed where the family does so."""
        by_head = x.view(-1, self.head_dim) if norm is None else normed(norm, x.view(-1, self.head_dim))
        return by_head.view(x.shape[0], -1, self.head_dim)


def normed(norm: nn.Module, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
    """RMSNorm with a module's weight and epsilon."""
    return rms_norm(x, cast(Tensor, norm.weight), cast(float, norm.variance_epsilon))


@dataclass(frozen=True)
class NotDescribed:
    """Why a model has no description."""

    reason: str


LLAMA_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}


def describe(model: nn.Module) -> Decoder | NotDescribed:
    """The description of a model, adapters included, or why there is none."""
    body, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(head, nn.Module) or len(layers) == 0:
        return NotDescribed(f"{type(model).__name__} is not built from a list of decoder layers and a head")
    reason = next(_obstacles(model, cast(nn.Module, body), layers, head), None)
    if reason is not None:
        return NotDescribed(reason)
    attention: Any = layers[0].self_attn
    config: Any = model.config
    return Decoder(
        embedding=cast(Any, body).embed_tokens,
        blocks=tuple(_block(layer) for layer in layers),
        norm=cast(Any, body).norm,
        head=head,
        rotary=cast(Any, body).rotary_emb,
        head_dim=attention.head_dim,
        kv_heads=config.num_key_value_heads,
        attention_scale=attention.scaling,
    )


def _block(layer: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    return Block(
        layer.input_layernorm,
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        layer.post_attention_layernorm,
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        getattr(attention, "q_norm", None),
        getattr(attention, "k_norm", None),
    )


def _obstacles(model: nn.Module, body: nn.Module, layers: nn.ModuleList, head: nn.Module) -> Iterator[str]:
    """Whatever keeps the model from being described, found lazily."""
    config: Any = model.config
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            yield f"'{name or type(model).__name__}' is hooked or patched, and only its own forward knows how"
    for layer in layers:
        if type(layer).__name__ not in LLAMA_LAYERS:
            yield f"layers of class {type(layer).__name__} have no description yet"
        yield from _unknown_parts(_block(layer))
    if getattr(config, "hidden_act", "silu") != "silu":
        yield f"activation {config.hidden_act} is not silu"
    if getattr(config, "attention_dropout", 0):
        yield "attention dropout is on"
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        yield "attention has a sliding window"
    if type(getattr(body, "norm", None)).__name__ not in NORMS:
        yield "the last norm is not RMSNorm"
    if not _is_linear(head) or getattr(head, "bias", None) is not None:
        yield "the output head is not a plain linear map"


def _unknown_parts(block: Block) -> Iterator[str]:
    for norm in (block.attention_norm, block.mlp_norm, block.q_norm, block.k_norm):
        if norm is not None and type(norm).__name__ not in NORMS:
            yield f"norms of class {type(norm).__name__} have no description yet"
    for projection in (block.q, block.k, block.v, block.o, block.gate, block.up, block.down):
        if not _is_linear(projection):
            yield f"projections of class {type(projection).__name__} have no description yet"


def _is_linear(module: nn.Module) -> bool:
    """Exactly torch's Linear, bare or under an adapter; subclasses may do something else."""
    if isinstance(module, LoraLinear):
        return type(module) is LoraLinear and type(module.base) is nn.Linear
    return type(module) is nn.Linear and not isinstance(module, AdapterLayer)
