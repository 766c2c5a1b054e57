"""The optimiser, its schedule and the settings of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from twofold.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How an adapter is trained.

    Attributes:
        batch_size: examples in one optimiser step, over all processes.
        micro_batch_size: examples in one forward pass; smaller ones are accumulated to a step, weighted by
            supervised tokens. The whole batch, or the process's share of it, at once when
            not given.
        micro_batch_tokens: tokens in one forward pass, about; a step's examples are then packed into as few passes as
            hold them, longest first.
        epochs: passes over the data.
        max_steps: stop after so many steps.
        learning_rate: at its highest, after warm-up.
        schedule: how it falls afterwards: `cosine` or `linear` to zero, or `constant`.
        warmup: share of the steps in which the rate rises linearly from zero.
        weight_decay: of AdamW, on the factors.
        beta1: of AdamW.
        beta2: of AdamW.
        gradient_clip: largest norm of the whole gradient; 0 for none.
        share_prefixes: compute once what several examples of a batch begin with; exact, and only on the fast path.
        cache_frozen: remember each example's states below the lowest layer that learns, so that they are computed once in all
            epochs; worth its memory (two bytes a value in bfloat16, for every token of the data) where only upper layers learn.
        compile: let torch.compile make single kernels of the norms, activations and losses on the fast path; worth its half minute
            in long runs, above all on a GPU.
        gradient_checkpointing: keep only each layer's input and compute the rest again: less memory, a third slower.
        evaluate_every: steps between evaluations; only at the end when not given.
        early_stopping: stop after so many evaluations without a better loss.
        checkpoint_every: steps between checkpoints; null for none.
        keep_checkpoints: how many of the newest stay on disk.
        seed: of the start, the order of the data and dropout.
        parallel: what several processes (torchrun) share: `data` gives each a whole base and a share of every step's
            examples; `shard` spreads the base over them as well (FSDP2), for one that no device holds alone.
    """

    batch_size: int = 16
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    epochs: int = 1
    max_steps: int | None = None
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    gradient_clip: float = 1.0
    share_prefixes: bool = True
    cache_frozen: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    early_stopping: int | None = None
    checkpoint_every: int | None = 200
    keep_checkpoints: int = 2
    seed: int = 0
    parallel: Literal["data", "shard"] = "data"

    def __post_init__(self) -> None:
        counts = ("batch_size", "micro_batch_size", "micro_batch_tokens", "epochs", "max_steps", "evaluate_every")
        for name in (*counts, "early_stopping", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value} but must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate} but must be above 0")
        if self.gradient_clip < 0 or self.weight_decay < 0 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(
                "gradient_clip and weight_decay must be at least 0, beta1 and beta2 at least 0 and below 1"
            )
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is {self.warmup} but must be a share of the steps, at least 0 and below 1")
        if self.early_stopping and not self.evaluate_every:
            raise ConfigError("early_stopping needs evaluate_every: it counts evaluations without a better loss")


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule."""
    warm = round(config.warmup * steps)
    if step < warm:
        return config.learning_rate * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (1 - done if config.schedule == "linear" else 1)


def optimiser(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) in one fused pass over all tensors."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
