"""PEFT's optimiser for LoRA+ (arXiv 2402.12354)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from twofold.training.optim import TrainingConfig, parameter_groups


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float | int,
    loraplus_weight_decay: float = 0.0,
    **optimizer_settings: Any,
) -> torch.optim.Optimizer:
    """An optimiser of any class, under which B learns `loraplus_lr_ratio` times faster than A, and decay is that of the update.

    Args:
        optimizer_settings: handed to the class.
    """
    config = TrainingConfig(
        learning_rate=lr, loraplus_lr_ratio=float(loraplus_lr_ratio), weight_decay=loraplus_weight_decay
    )
    groups = [
        {"params": group["params"], "lr": lr * group["ratio"], "weight_decay": group["weight_decay"]}
        for group in parameter_groups(model, config)
    ]
    return optimizer_cls(groups, **{"lr": lr, **optimizer_settings})
