"""One description of a decoder: which modules are its projections, norms and rotary embedding.

The fast training path and the engine read the same description and run the same functions over it. A model is described
only when every module in it does exactly what those functions do: known classes, no hooks, no patched forward. For any
other model there is a sentence that says why, and the plain path through the model's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from twofold.functional.attention import Scoring
from twofold.functional.gated import ACTIVATIONS, Activation
from twofold.functional.norm import Norm, rms_norm
from twofold.functional.rope import Angles
from twofold.functional.segments import Heads
from twofold.layers.block import BlockTensors
from twofold.layers.linear import LoraLinear, LoraQuantised, dropout_of, projection_of
from twofold.layers.protocol import AdapterLayer
from twofold.layers.quantised import QuantisedLinear
from twofold.layers.tokens import TrainedTokens
from twofold.lowrank.linear import Group

UNTURNED = "none"
"""The kind of layers without rotary positions."""


@dataclass(frozen=True)
class Block:
    """The modules of one layer; see `layers/block.py` for what it computes.

    Attributes:
        qkv, gate_up: separate projections, or one whose output holds them side by side.
        attention_post, mlp_post: norms of what is added to the residual, where the family has them.
        window: how many tokens a token sees, itself included; all when None.
        turning: which of the model's rotary embeddings it uses.
    """

    attention_norm: nn.Module
    qkv: tuple[nn.Module, ...]
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    o: nn.Module
    attention_post: nn.Module | None
    mlp_norm: nn.Module
    gate_up: tuple[nn.Module, ...]
    down: nn.Module
    mlp_post: nn.Module | None
    window: int | None
    turning: str

    def projections(self) -> tuple[tuple[nn.Module, ...], ...]:
        """In groups that read the same input, in the order of the forward pass."""
        return self.qkv, (self.o,), self.gate_up, (self.down,)

    def all_norms(self) -> tuple[nn.Module | None, ...]:
        """In the order of the forward pass, None where the family has none."""
        return (self.attention_norm, self.q_norm, self.k_norm, self.attention_post, self.mlp_norm, self.mlp_post)

    def norms(self) -> list[nn.Module]:
        return [n for n in self.all_norms() if n is not None]


@dataclass(frozen=True)
class Decoder:
    """A decoder in the structure of Llama and its relatives: embedding, blocks, norm, head; rotary positions, RMSNorm.

    Attributes:
        logit_softcap: logits become cap · tanh(logits / cap), in Gemma 2.
    """

    embedding: nn.Module
    blocks: tuple[Block, ...]
    norm: nn.Module
    head: nn.Module
    rotary: nn.Module
    head_dim: int
    heads: Heads
    scoring: Scoring
    activation: Activation
    logit_softcap: float | None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the products."""
        return cast(Tensor, self.norm.weight).dtype

    def angles(self, like: Tensor, positions: Int[Tensor, " rows"]) -> dict[str, Angles]:
        """The angles of every row, for each kind of turning that some layer uses."""
        return {kind: self._angles(kind, like, positions) for kind in {b.turning for b in self.blocks}}

    def _angles(self, kind: str, like: Tensor, positions: Tensor) -> Angles:
        if kind == UNTURNED:
            nothing = like.new_zeros(len(positions), 0)
            return Angles.of(nothing, nothing)
        cos, sin = self.rotary(like[None], positions[None], *([kind] if kind else []))
        return Angles.of(cos[0], sin[0])

    def tensors(self, block: Block) -> tuple[BlockTensors, list[Tensor]]:
        """A layer's tensors in the type of the products, as they stand now, and what it learns."""
        projections = [[projection_of(m) for m in modules] for modules in block.projections()]
        qkv, o, gate_up, down = (
            Group.of(found, self.dtype, dropout_of(modules))
            for found, modules in zip(projections, block.projections(), strict=True)
        )
        key_width = self.heads.keys * self.head_dim
        tensors = BlockTensors(
            attention_norm=norm_of(block.attention_norm),
            qkv=qkv,
            q_norm=_norm(block.q_norm),
            k_norm=_norm(block.k_norm),
            o=o,
            attention_post=_norm(block.attention_post),
            mlp_norm=norm_of(block.mlp_norm),
            gate_up=gate_up,
            down=down,
            mlp_post=_norm(block.mlp_post),
            activation=self.activation,
            scoring=self.scoring,
            head_dim=self.head_dim,
            widths=(self.heads.queries * self.head_dim, key_width, key_width),
        )
        return tensors, [t for found in projections for p in found for t in p.learned()]

    def logits(self, hidden: Float[Tensor, "rows d"]) -> Float[Tensor, "rows vocabulary"]:
        """From the last block's output at some rows."""
        logits = cast(Tensor, self.head(rms_norm(hidden, norm_of(self.norm))))
        return logits if self.logit_softcap is None else torch.tanh(logits / self.logit_softcap) * self.logit_softcap


def norm_of(module: nn.Module) -> Norm:
    """An RMSNorm's weight as a factor, and its epsilon. Gemma's weights are written as their difference from one."""
    weight = cast(Tensor, module.weight)
    if type(module).__name__ in NORMS_FROM_ONE:
        return Norm(1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32)), cast(float, module.eps))
    return Norm(weight, cast(float, module.variance_epsilon))


def _norm(module: nn.Module | None) -> Norm | None:
    return None if module is None else norm_of(module)


@dataclass(frozen=True)
class NotDescribed:
    """Why a model has no description."""

    reason: str


POST_NORMED = {"Gemma2DecoderLayer", "Gemma3DecoderLayer"}
LAYERS = POST_NORMED | {
    *("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"),
    *("SmolLM3DecoderLayer", "GemmaDecoderLayer", "Phi3DecoderLayer"),
}
NORMS_FROM_ONE = {"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"}
NORMS = NORMS_FROM_ONE | {
    *("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm", "Phi3RMSNorm")
}
GROWING = {"dynamic", "longrope"}
"""Rotary embeddings whose angles depend on how long a batch happens to be."""


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
    gemma2 = type(layers[0]).__name__ == "Gemma2DecoderLayer"
    return Decoder(
        embedding=cast(Any, body).embed_tokens,
        blocks=tuple(_block(layer, cast(nn.Module, body)) for layer in layers),
        norm=cast(Any, body).norm,
        head=head,
        rotary=cast(Any, body).rotary_emb,
        head_dim=attention.head_dim,
        heads=Heads(config.num_attention_heads, config.num_key_value_heads),
        scoring=Scoring(attention.scaling, config.attn_logit_softcapping if gemma2 else None),
        activation=ACTIVATIONS[_activation(config)],
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _block(layer: Any, body: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    one_qkv, one_gate_up = getattr(attention, "qkv_proj", None), getattr(mlp, "gate_up_proj", None)
    post_normed = type(layer).__name__ in POST_NORMED
    by_layer = isinstance(getattr(body.rotary_emb, "rope_type", None), dict)
    return Block(
        attention_norm=layer.input_layernorm,
        qkv=(one_qkv,) if one_qkv else (attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        o=attention.o_proj,
        attention_post=layer.post_attention_layernorm if post_normed else None,
        mlp_norm=layer.pre_feedforward_layernorm if post_normed else layer.post_attention_layernorm,
        gate_up=(one_gate_up,) if one_gate_up else (mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        mlp_post=layer.post_feedforward_layernorm if post_normed else None,
        window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
        turning=UNTURNED if not getattr(attention, "use_rope", True) else attention.layer_type if by_layer else "",
    )


def _obstacles(model: nn.Module, body: nn.Module, layers: nn.ModuleList, head: nn.Module) -> Iterator[str]:
    """Whatever keeps the model from being described, found lazily."""
    config: Any = model.config
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            yield f"'{name or type(model).__name__}' is hooked or patched, and only its own forward knows how"
        if isinstance(module, AdapterLayer) and [*module.base.children()]:
            yield f"'{name}' is adapted as a whole, and only its own forward knows how"
    for layer in layers:
        if type(layer).__name__ not in LAYERS:
            yield f"layers of class {type(layer).__name__} have no description yet"
        yield from _unknown_parts(_block(layer, body))
    if _activation(config) not in ACTIVATIONS:
        yield f"activation {_activation(config)} is none of {', '.join(ACTIVATIONS)}"
    if getattr(config, "attention_dropout", 0) or getattr(config, "resid_pdrop", 0):
        yield "the base's own dropout is on"
    if getattr(config, "use_bidirectional_attention", False):
        yield "attention looks both ways"
    rope_type = getattr(getattr(body, "rotary_emb", None), "rope_type", "default")
    if GROWING & set(rope_type.values() if isinstance(rope_type, dict) else [rope_type]):
        yield "its rotary embedding depends on the length of the batch"
    if type(getattr(body, "norm", None)).__name__ not in NORMS:
        yield "the last norm is not RMSNorm"
    if not (_is_linear(head) or isinstance(head, TrainedTokens)) or getattr(head, "bias", None) is not None:
        yield "the output head is not a plain linear map"


def _unknown_parts(block: Block) -> Iterator[str]:
    for norm in block.norms():
        if type(norm).__name__ not in NORMS:
            yield f"norms of class {type(norm).__name__} have no description yet"
    for projection in (m for modules in block.projections() for m in modules):
        if not _is_linear(projection):
            yield f"projections of class {type(projection).__name__} have no description yet"


def _is_linear(module: nn.Module) -> bool:
    """Exactly torch's Linear or a packed one of ours, bare or under an adapter; subclasses may do something else."""
    if isinstance(module, LoraLinear):
        return (type(module), type(module.base)) in ((LoraLinear, nn.Linear), (LoraQuantised, QuantisedLinear))
    return type(module) in (nn.Linear, QuantisedLinear) and not isinstance(module, AdapterLayer)
