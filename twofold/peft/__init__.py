"""A face in PEFT's shape: scripts that say `from peft import LoraConfig, get_peft_model` run with this module's name instead.

Everything is done by Twofold's own functions; these files only have PEFT's names for them. What differs is in docs/peft.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from twofold.peft.config import LoraConfig, PeftConfig, TaskType
from twofold.peft.helpers import (
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from twofold.peft.model import PeftModel, get_peft_model

if TYPE_CHECKING:
    from twofold.peft.resuming import Trainer as Trainer

PeftModelForCausalLM = PeftModelForSeq2SeqLM = PeftModelForSequenceClassification = PeftModel
PeftModelForTokenClassification = PeftModelForQuestionAnswering = PeftModelForFeatureExtraction = PeftModel

__all__ = [
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    """`Trainer`, whose import takes seconds, when first asked for."""
    if name != "Trainer":
        raise AttributeError(f"module 'twofold.peft' has no '{name}'; docs/peft.md lists what it has of PEFT's names")
    return importlib.import_module("twofold.peft.resuming").Trainer
