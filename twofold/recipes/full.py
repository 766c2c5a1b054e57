"""`twofold train --full`: what differs where the whole base learns, and no adapter does.

The data, the loss, the schedule, the checkpoints and the report are those of every training. The model runs through its own
forward, since the fast path computes no gradients of weights; held-out losses are measured as those of adapters are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twofold.base.blocks import NotDescribed
from twofold.base.load import Base
from twofold.merging.checkpoint import write_state
from twofold.training.objective import Objective, plain_objective
from twofold.training.tasks import task_objective

WHY = NotDescribed("full fine-tuning takes the gradients of all weights, which the fast path does not compute")


def free(base: Base) -> None:
    """Let every parameter of the base learn."""
    base.model.requires_grad_(True)


def full_objective(model: Any, pad_id: int, *, recompute: bool) -> Objective:
    """The objective of the model's task, through its own forward."""
    task = task_objective(model, pad_id)
    if task is None:
        return plain_objective(model, pad_id, WHY, recompute=recompute)
    if recompute:
        model.activation_checkpointing_enable()
    return task


def save_model(base: Base, output: Path) -> Path:
    """Write the whole model as a Hugging Face folder, in place of one that a killed process wrote before its report.

    Raises:
        RunError: the folder cannot be written.
    """
    state, template = dict(base.model.state_dict()), base.renderer.template
    return write_state(base.model, base.tokenizer, output, state, chat_template=template, replace=True)
