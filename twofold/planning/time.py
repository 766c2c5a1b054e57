"""How long a training step takes: its operations, and the bytes it moves, over what this machine reaches.

A step multiplies, and between the products it walks over what it keeps: seconds = operations / products a second
+ passes · activations / bytes a second. Both rates are measured here in under two seconds, products by our own kernels where these
will make them; how many passes a loop makes over its activations is a constant of the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from twofold.functional.gated import ACTIVATIONS, gated
from twofold.lowrank import products
from twofold.native.training import native_kernels
from twofold.planning.architecture import Architecture, StepShape
from twofold.planning.formulas import Term, worked_out
from twofold.planning.memory import MemoryPlan, Method

PASSES, WITH_KERNELS = 20.0, 35.0
"""How often a step walks over its activations outside of products: by PyTorch's operations, by our kernels (docs/planner.md)."""
SECONDS = 0.7
"""For each of the two measurements."""
WIDEST = 4096
"""Larger layers are measured at this width: the rate no longer depends on it."""

OPERATIONS: dict[Method, tuple[Term, ...]] = {
    "lora": (
        Term("layers", "(4 + 2 * again) * T * P_linear"),
        Term("factors", "(6 + 2 * again) * T * P_train"),
        Term("attention", "(12 + 4 * again) * T * S * d_q * L"),
        Term("head", "4 * Y * V * h"),
    ),
    "full": (
        Term("layers", "(6 + 2 * again) * T * P_linear"),
        Term("attention", "(12 + 4 * again) * T * S * d_q * L"),
        Term("head", "6 * T * V * h"),
    ),
}
"""Multiplications and additions: forward 2, input gradient 2, weight gradient 2 for each weight and token; `again` is 1 where
gradient checkpointing runs the forward a second time."""


@dataclass(frozen=True)
class Rates:
    """What this machine reaches: operations a second in products, bytes a second in elementwise work, and its passes in a step."""

    products: float
    bytes: float
    passes: float


@dataclass(frozen=True)
class TimePlan:
    """Seconds of one forward and backward pass, and where they come from."""

    seconds: float
    tokens: int
    operations: dict[str, float]
    rates: Rates

    def as_json(self) -> dict[str, Any]:
        return {
            "seconds_per_step": self.seconds,
            "seconds_per_token": self.seconds / self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "operations": self.operations,
            "products_per_second": self.rates.products,
            "bytes_per_second": self.rates.bytes,
        }


@lru_cache(maxsize=16)
def measure_rates(shape: Architecture, dtype: torch.dtype, device: torch.device, *, kernels: bool) -> Rates:
    """Time a product of this model's MLP, with ever more rows, and its activation; once in a process.

    Args:
        kernels: whether our own kernels make the products.
    """
    hidden, wide = min(shape.hidden, WIDEST), min(shape.intermediate, WIDEST)
    w = torch.ones(wide, hidden, dtype=dtype, device=device)
    x = torch.ones(1024, hidden, dtype=dtype, device=device)
    y = torch.ones(1024, wide, dtype=dtype, device=device)

    def product(rows: int) -> float:
        products.sum_of_products([products.Term(x[:rows], w)])[-1, -1].item()
        return 2.0 * rows * hidden * wide

    def activation(rows: int) -> float:
        torch.nn.functional.silu(y[:rows])[-1, -1].item()
        return 2.0 * rows * wide * dtype.itemsize

    def gate(rows: int) -> float:
        gated(y[:rows], y[:rows], ACTIVATIONS["silu"])[-1, -1].item()
        return 3.0 * rows * wide * dtype.itemsize

    if not kernels:
        return Rates(_best_rate(product), _best_rate(activation), PASSES)
    with native_kernels():
        return Rates(_best_rate(product), _best_rate(gate), WITH_KERNELS)


def _best_rate(work: Callable[[int], float]) -> float:
    """The most that `work(rows)` does in a second, from few rows to many, within the time allowed."""
    best, began = 0.0, time.perf_counter()
    for rows in (16, 64, 256, *[1024] * 20):
        start = time.perf_counter()
        done = work(rows)
        best = max(best, done / (time.perf_counter() - start))
        if time.perf_counter() - began > SECONDS / 2:
            break
    return best


def plan_time(memory: MemoryPlan, step: StepShape, method: Method, rates: Rates) -> TimePlan:
    """Seconds of the step that `memory` was planned for."""
    symbols = {**memory.symbols, "again": float(step.recompute)}
    operations = worked_out(OPERATIONS[method], symbols)
    moved = rates.passes * memory.symbols["L"] * memory.layer
    return TimePlan(sum(operations.values()) / rates.products + moved / rates.bytes, step.tokens, operations, rates)
