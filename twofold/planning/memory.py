"""How much memory a training step takes, term by term, before it is run.

Every term is a formula over a few symbols (`SYMBOLS`), in bytes, for one micro-batch. What differs between training loops is
what a layer keeps for its backward (`layer`), the temporaries while it runs (`passing`) and the logits; all else is common.

Sources. The fast path: what twofold/layers/block.py saves. The stock loop: transformers' Llama with PEFT, as derived and
checked in tests/planning/test_published_memory.py: two float32 copies for the norms, q, k, v, the attention's output and
its row statistics, silu's input and output and up, and a float32 copy of each adapted module's input. Full fine-tuning in mixed
precision: arXiv 1910.02054. NF4: arXiv 2305.14314.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from twofold.functional.attention import KEEP_UP_TO
from twofold.functional.loss import CHUNK_ELEMENTS, SLICE_ELEMENTS
from twofold.functional.segments import CHUNK_MULTIPLE, CHUNK_SCORES
from twofold.planning.architecture import Architecture, StepShape
from twofold.planning.formulas import Term, symbols_in, worked_out
from twofold.planning.parameters import ParameterPlan

Method: TypeAlias = Literal["full", "lora"]
Quantization: TypeAlias = Literal["none", "int8", "nf4"]

QUANTIZED_BYTES = {"int8": 1.0, "nf4": (4 + 8 / 64 + 32 / (64 * 256)) / 8}
"""Bytes a weight: NF4 has 4 bits, an 8-bit scale for 64 of them and a 32-bit scale for 256 of those: 0.5159."""
KERNELS = {"cpu": 184 << 20, "cuda": 500 << 20}
"""What a model's code, kernels and threads add once they run; on a GPU the context, which is 0.3 to 1.4 GB."""
OWN_KERNELS = {2: 151 << 20, 4: 245 << 20}
"""The same by the bytes of a value, where the fast path runs on our own, which leave only the logits to others."""
SHAPE_KERNELS = {"cpu": 13 << 20, "cuda": 0}
"""What each further number of rows adds, for which a CPU's back end prepares kernels of its own and keeps them: the mean of eleven
numbers of rows that a training of SmolLM2-135M went through one after the other, from 224 to 608."""
PACKING = {"none": 0, "int8": 0, "nf4": 117 << 20}
"""What loading bitsandbytes adds to a process."""
SLACK = {"cpu": 0.12, "cuda": 0.0}
"""Freed memory that the allocator can neither reuse nor return, as a share of what comes and goes: the activations once, a
layer's blocks again and again. Fitted, with the kernels' bytes and the 14 below, on the first table of docs/planner.md;
PyTorch's own allocator on a GPU showed none against PEFT's published runs."""
PROOF_TOKENS = 512
"""Tokens that a proof is made on."""
PROOF_LOGITS = 1 << 23
"""Logits that it compares at most: 64 MiB in float64."""
EXACT = {"weights", "adapter", "gradients", "optimizer"}
UNCERTAINTY = (0.85, 1.2)
"""From the expected to low and high, for the terms that are not exact."""

SYMBOLS = {
    "P": "parameters of the base",
    "P_linear": "of these, weights of linear layers but the head",
    "P_train": "parameters that train",
    "L": "layers",
    "h": "hidden width",
    "m": "MLP width",
    "d_q": "width of the queries",
    "d_kv": "width of the keys",
    "heads": "attention heads",
    "V": "vocabulary",
    "R": "sum of all adapters' ranks",
    "D": "sum of DoRA's adapted modules' output widths, each kept once more for the gradient of its lengths; 0 without DoRA",
    "X": "sum of all adapted modules' input widths",
    "T": "tokens in one forward pass",
    "Y": "of these, supervised",
    "S": "tokens of the longest example",
    "s": "values that attention keeps of a query's head: probabilities of the keys it sees on average; with our kernels 4 bytes",
    "d_raw": "widths of products that a norm follows, so that they are kept before and after it",
    "casts": "bytes of the factors in the base's type, kept with the layers; 0 where that is float32",
    "e": "bytes of a value in the base's type",
    "q": "bytes of a weight of a linear layer, which a quantised base has fewer of",
    "master": "bytes of a float32 copy of a weight, 0 where the weights are float32",
    "dequantised": "bytes of the largest weight, written out for its product; 0 when not quantised",
    "chunk": "logits alive at once",
    "widened": "of these, in float32",
    "P_adapted": "values of the weights that are adapted",
    "largest": "values of the largest of these",
    "proved": "tokens that a proof is made on",
    "compared": "logits that a proof compares at most",
    "held": "bytes that this process holds without a base: interpreter and libraries",
    "kernels": "bytes that the model's code, kernels and threads add; the context on a GPU",
    "shapes": "numbers of rows that occur in a run",
    "k_shape": "bytes of kernels that each further one adds",
    "f": "share that the allocator loses",
    "N": "devices",
}


@dataclass(frozen=True)
class Loop:
    """A training loop: bytes that a layer keeps, bytes passing while it runs, bytes of logits, bytes of a proof at the end."""

    layer: str
    passing: str
    logits: str
    proof: str


PROOF = "8 * largest + e * max(largest, P_adapted / L) + 6 * e * min(proved * V, compared)"
"""A layer's merged weights, one of them twice more in float32 while it is formed (its update and the sum), and three sets of
logits. A proof finds free what a step took beside weights and adapter; the term is what goes beyond."""
FAST = Loop(
    layer="T * e * (2 * h + 2 * d_q + 2 * d_kv + d_raw + 2 * m + heads * s + (R + D) / L) + casts / L",
    passing="T * e * (5 * m + 2 * h)",
    logits="e * min(Y * V, chunk) + 4 * min(Y * V, widened)",
    proof=PROOF,
)
PLAIN = Loop(
    layer="T * (8 * h + e * (2 * h + 3 * d_q + 2 * d_kv + 4 * m + (R + D) / L))",
    passing="T * 5 * e * m",
    logits="Y * V * (12 + e)",
    proof=PROOF,
)
STOCK = Loop(
    layer="T * (8 * h + e * (2 * d_q + 2 * d_kv + 3 * m) + 4 * heads + (4 * X + (4 + e) * D) / L)",
    passing="0",
    logits="T * V * (12 + e)",
    proof="0",
)
STOCK_FULL = Loop(
    layer="T * (8 * h + e * (4 * h + 2 * d_q + 2 * d_kv + 4 * m) + 4 * heads)",
    passing="0",
    logits="T * V * (12 + e)",
    proof="0",
)

PLAIN_FULL = replace(STOCK_FULL, logits=PLAIN.logits)
"""The same with logits at supervised rows only."""

WHOLE = Term("weights", "e * (P - P_linear) + q * P_linear")
GATHERED = "e * (P - P_linear) + 2 * q * P_linear / L"
STATE: dict[Method, tuple[Term, ...]] = {
    "lora": (Term("adapter", "4 * P_train"), Term("gradients", "4 * P_train"), Term("optimizer", "8 * P_train")),
    "full": (Term("adapter", "0"), Term("gradients", "e * P"), Term("optimizer", "(8 + master) * P")),
}
KEPT = {False: "L * layer", True: "L * T * h * e + layer"}
"""Activations without and with gradient checkpointing."""
COMMON = (
    Term("workspace", "max(0, passing + dequantised - logits)"),
    Term("runtime", "held + kernels + (shapes - 1) * k_shape"),
    Term("slack", "f * (activations + 14 * layer)"),
)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What surrounds the step.

    Attributes:
        loop: which training loop.
        method: all parameters, or an adapter's.
        quantization: of the base's linear layers.
        device: `cpu` or `cuda`.
        held: bytes that the process holds without a base.
        devices: how many hold parts of the model.
        shapes: numbers of rows that occur in a run.
        kernels: whether the fast path runs on our own (`native/training.py`).
    """

    loop: Loop
    method: Method = "lora"
    quantization: Quantization = "none"
    device: str = "cpu"
    held: int = 0
    devices: int = 1
    shapes: int = 1
    kernels: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by term, with the formulas that gave them and the values of their symbols; `layer` is what one layer keeps."""

    terms: dict[str, int]
    layer: float
    formulas: tuple[Term, ...]
    symbols: dict[str, float]

    @property
    def expected(self) -> int:
        return sum(self.terms.values())

    @property
    def bounds(self) -> tuple[int, int]:
        """Low and high."""
        exact = sum(v for k, v in self.terms.items() if k in EXACT)
        low, high = (round(exact + u * (self.expected - exact)) for u in UNCERTAINTY)
        return low, high

    def as_json(self) -> dict[str, Any]:
        low, high = self.bounds
        return {**self.terms, "total": {"low": low, "expected": self.expected, "high": high}}

    def explained(self) -> dict[str, Any]:
        """The formula of every term, and what each symbol in them means and is here."""
        used = symbols_in(self.formulas)
        return {
            "formulas": {t.name: t.shown() for t in self.formulas},
            "symbols": {k: {"value": v, "meaning": SYMBOLS[k]} for k, v in self.symbols.items() if k in used},
        }


def plan_memory(parameters: ParameterPlan, shape: Architecture, step: StepShape, setup: Setup) -> MemoryPlan:
    """The terms of a training step on a device that holds the whole model."""
    terms = memory_terms(setup.loop, step.recompute, WHOLE, *STATE[setup.method])
    return _plan(terms, parameters, shape, step, setup)


def plan_sharded(parameters: ParameterPlan, shape: Architecture, step: StepShape, setup: Setup) -> MemoryPlan:
    """The same on one of N devices that share the base: each holds an N-th of it and gathers the embedding, the head and,
    while they run, two layers (one at work and the next on its way: FSDP, arXiv 2304.11277).

    An adapter is small enough for every device to hold it whole; in full fine-tuning the state is shared out like the weights.
    """
    shared = STATE[setup.method]
    if setup.method == "full":
        shared = tuple(Term(t.name, f"({t.formula}) / N") for t in shared)
    held = (Term(WHOLE.name, f"({WHOLE.formula}) / N"), Term("gathered", GATHERED))
    return _plan(memory_terms(setup.loop, step.recompute, *held, *shared), parameters, shape, step, setup)


def memory_terms(loop: Loop, recompute: bool, *held: Term) -> tuple[Term, ...]:
    """The terms in the order in which they are worked out; `layer` and `passing` are parts of others."""
    return (
        Term("layer", loop.layer),
        Term("passing", loop.passing),
        *held,
        Term("activations", KEPT[recompute]),
        Term("logits", loop.logits),
        *COMMON,
        Term("proof", f"max(0, {loop.proof} - gradients - optimizer - activations - logits - workspace - slack)"),
    )


def _plan(
    formulas: Sequence[Term], parameters: ParameterPlan, shape: Architecture, step: StepShape, setup: Setup
) -> MemoryPlan:
    symbols = symbol_values(parameters, shape, step, setup)
    values = worked_out(formulas, symbols)
    terms = {name: round(v) for name, v in values.items() if name not in ("layer", "passing")}
    return MemoryPlan(terms, values["layer"], tuple(formulas), symbols)


def symbol_values(parameters: ParameterPlan, shape: Architecture, step: StepShape, setup: Setup) -> dict[str, float]:
    """The value of each of `SYMBOLS`."""
    e = step.element_bytes
    quantized = setup.quantization != "none"
    values: dict[str, float] = {
        "P": parameters.base,
        "P_linear": parameters.linear,
        "P_train": parameters.base if setup.method == "full" else parameters.trainable,
        "L": shape.layers,
        "h": shape.hidden,
        "m": shape.intermediate,
        "d_q": shape.q_width,
        "d_kv": shape.kv_width,
        "heads": shape.heads,
        "V": shape.vocabulary,
        "R": parameters.ranks,
        "D": parameters.dora_outputs,
        "X": parameters.adapted_inputs,
        "T": step.tokens,
        "Y": step.supervised_tokens,
        "S": step.length,
        "s": 4 / e if setup.kernels else kept_keys(step, shape.heads),
        "d_raw": shape.normed_twice,
        "casts": e * parameters.trainable if e < 4 else 0,
        "e": e,
        "q": QUANTIZED_BYTES[setup.quantization] if quantized else e,
        "master": 4 if e < 4 else 0,
        "dequantised": e * shape.hidden * shape.intermediate if quantized else 0,
        "chunk": CHUNK_ELEMENTS,
        "widened": SLICE_ELEMENTS if setup.device == "cpu" else CHUNK_ELEMENTS,
        "P_adapted": parameters.adapted_base,
        "largest": parameters.largest,
        "proved": PROOF_TOKENS,
        "compared": PROOF_LOGITS,
        "held": setup.held if setup.device == "cpu" else 0,
        "kernels": (OWN_KERNELS[e] if setup.kernels else KERNELS[setup.device])
        + (PACKING[setup.quantization] if setup.device == "cpu" else 0),
        "shapes": setup.shapes,
        "k_shape": 0 if setup.kernels and not quantized else SHAPE_KERNELS[setup.device],
        "f": SLACK[setup.device],
        "N": setup.devices,
    }
    return {name: float(value) for name, value in values.items()}


def kept_keys(step: StepShape, heads: int) -> float:
    """Keys whose probabilities the fast path keeps, for each query on average (`functional/segments.py`).

    Queries come in chunks, each of which sees the keys up to its own end, and keeps what it saw if that is not too much.
    """
    chunk = min(
        step.length, max(CHUNK_MULTIPLE, CHUNK_SCORES // (step.tokens * heads) // CHUNK_MULTIPLE * CHUNK_MULTIPLE)
    )
    whole_chunks = min(step.length, KEEP_UP_TO // chunk * chunk)
    return whole_chunks / step.length * (whole_chunks + chunk) / 2
