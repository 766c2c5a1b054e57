"""Where PEFT keeps these too."""

from __future__ import annotations

from twofold.peft.config import PeftType, TaskType
from twofold.peft.helpers import (
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)

__all__ = [
    "PeftType",
    "TaskType",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
