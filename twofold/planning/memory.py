"""How much memory a training step takes, term by term, before it is run.

Bytes, for one micro-batch of T tokens, e bytes per value of the model's type. The activations are those that the fast
path keeps for a layer: the inputs of the two norms (2 h), the two normed inputs (2 h), q, k, v after rotation as attention
holds them and its output (2 d_q + 2 d_kv), gate, up and their product (3 m), h = x Aᵀ of every adapter (Σ r), the attention
probabilities (heads · length). Models on the plain path keep more: PyTorch's own norm, rotation and activation double several
of these. With gradient checkpointing a layer keeps its input only, and one layer is whole at a time.

The proof at the end finds free what a step took beside weights and adapter. It needs three sets of logits, a layer's
merged weights, and one of them twice more in float32 while it is formed: its update and the sum. That is less, unless a
weight as large as a vocabulary is adapted; what goes beyond is the term `proof`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from twofold.functional.attention import KEEP_UP_TO
from twofold.functional.loss import CHUNK_ELEMENTS
from twofold.planning.parameters import ParameterPlan

PLAIN_PATH = 2.2
"""How much more the plain path keeps of a layer than the fast path does."""
RUNTIME_BYTES = 600 << 20
"""Interpreter, PyTorch, transformers and the thread pool's work space, before any weight: 0.5 to 0.7 GB measured."""
PROOF_TOKENS = 512
"""Tokens that a proof is made on."""
PROOF_LOGITS = 1 << 23
"""Logits that it compares at most: 64 MiB in float64."""
UNCERTAINTY = (0.85, 1.25)
"""From the expected total to low and high: allocator slack and kernels' work space."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a decoder that its activations depend on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    q_width: int
    kv_width: int
    vocabulary: int
    fast_path: bool


def architecture(config: Any, *, fast_path: bool) -> Architecture:
    """The sizes, from a transformers config."""
    text = config.get_text_config()
    heads = text.num_attention_heads
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
        fast_path=fast_path,
    )


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """One forward and backward pass: T tokens in examples of at most `length`, of which some are supervised."""

    tokens: int
    length: int
    supervised_tokens: int
    element_bytes: int
    recompute: bool


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by term."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    proof: int
    runtime: int

    @property
    def expected(self) -> int:
        return sum(asdict(self).values())

    def as_json(self) -> dict[str, Any]:
        low, high = (int(self.expected * u) for u in UNCERTAINTY)
        return {**asdict(self), "total": {"low": low, "expected": self.expected, "high": high}}


def plan_memory(parameters: ParameterPlan, shape: Architecture, step: StepShape, ranks: int) -> MemoryPlan:
    """The terms of a training step; `ranks` is the sum of all adapters' ranks."""
    master = 4 * parameters.trainable
    activations, logits = _activations(shape, step, ranks), _logits(shape, step)
    return MemoryPlan(
        weights=parameters.base * step.element_bytes,
        adapter=master,
        gradients=master,
        optimizer=2 * master,
        activations=activations,
        logits=logits,
        proof=max(0, _proof(parameters, shape, step) - 3 * master - activations - logits),
        runtime=RUNTIME_BYTES,
    )


def _activations(shape: Architecture, step: StepShape, ranks: int) -> int:
    values = 4 * shape.hidden + 2 * shape.q_width + 2 * shape.kv_width + 3 * shape.intermediate
    if step.length <= KEEP_UP_TO:
        values += shape.heads * step.length
    layer = step.tokens * (values * (1 if shape.fast_path else PLAIN_PATH) + ranks / shape.layers) * step.element_bytes
    if step.recompute:
        return int(shape.layers * step.tokens * shape.hidden * step.element_bytes + layer)
    return int(shape.layers * layer)


def _logits(shape: Architecture, step: StepShape) -> int:
    """The fast path holds one chunk in float32 and in the model's type; the plain path all rows, several times."""
    rows = step.supervised_tokens
    if shape.fast_path:
        return int(min(rows * shape.vocabulary, CHUNK_ELEMENTS) * (4 + 4 + step.element_bytes))
    return rows * shape.vocabulary * (3 * 4 + step.element_bytes)


def _proof(parameters: ParameterPlan, shape: Architecture, step: StepShape) -> int:
    """What the proof takes beside weights and adapter."""
    layer = max(parameters.largest, parameters.adapted_base // shape.layers)
    formed = parameters.largest * (4 + 4) + layer * step.element_bytes
    return formed + 3 * min(PROOF_TOKENS * shape.vocabulary, PROOF_LOGITS) * 2 * step.element_bytes
