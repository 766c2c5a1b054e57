"""How long a training step takes: its operations over the rate that this machine's products reach."""

from __future__ import annotations

import time

import torch

from twofold.planning.memory import Architecture, StepShape
from twofold.planning.parameters import ParameterPlan

EFFICIENCY = 0.6
"""Share of the step's time that its matrix products account for on the fast path: 0.55 to 0.7 measured."""


def step_operations(parameters: ParameterPlan, shape: Architecture, step: StepShape) -> int:
    """Multiply-adds of a step, times two: forward and input gradient of the layers (4 P a token), the factors' three
    products (6 P_lora), the head at supervised rows (4 V d); recomputation adds a forward."""
    layers = parameters.base - shape.vocabulary * shape.hidden
    passes = 6 if step.recompute else 4
    return (
        step.tokens * (passes * layers + 6 * parameters.trainable)
        + 4 * step.supervised_tokens * shape.vocabulary * shape.hidden
    )


def product_rate(shape: Architecture, dtype: torch.dtype, device: torch.device, rows: int = 512) -> float:
    """Operations a second of a product of this model's MLP size, measured in about a tenth of a second."""
    x = torch.ones(rows, shape.hidden, dtype=dtype, device=device)
    w = torch.ones(shape.intermediate, shape.hidden, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * rows * shape.hidden * shape.intermediate / best


def step_seconds(parameters: ParameterPlan, shape: Architecture, step: StepShape, rate: float) -> float:
    """Seconds of one optimiser step's forward and backward."""
    return step_operations(parameters, shape, step) / (rate * EFFICIENCY)
