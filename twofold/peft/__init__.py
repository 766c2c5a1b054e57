"""A face in PEFT's shape: scripts that say `from peft import LoraConfig, get_peft_model` run with this module's name instead.

Everything is done by Twofold's own functions; these files only have PEFT's names for them. What differs is in docs/peft.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from twofold.peft.auto import AUTO
from twofold.peft.config import LoraConfig, PeftConfig, PeftType, TaskType
from twofold.peft.helpers import (
    get_peft_config,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from twofold.peft.missing import NOT_HERE, not_here
from twofold.peft.model import PeftModel, get_peft_model
from twofold.peft.status import get_layer_status, get_model_status

if TYPE_CHECKING:
    from twofold.peft.resuming import Trainer as Trainer

PeftModelForCausalLM = PeftModelForSeq2SeqLM = PeftModelForSequenceClassification = PeftModel
PeftModelForTokenClassification = PeftModelForQuestionAnswering = PeftModelForFeatureExtraction = PeftModel

AutoPeftModel = AUTO["AutoPeftModel"]
AutoPeftModelForCausalLM = AUTO["AutoPeftModelForCausalLM"]
AutoPeftModelForFeatureExtraction = AUTO["AutoPeftModelForFeatureExtraction"]
AutoPeftModelForQuestionAnswering = AUTO["AutoPeftModelForQuestionAnswering"]
AutoPeftModelForSeq2SeqLM = AUTO["AutoPeftModelForSeq2SeqLM"]
AutoPeftModelForSequenceClassification = AUTO["AutoPeftModelForSequenceClassification"]
AutoPeftModelForTokenClassification = AUTO["AutoPeftModelForTokenClassification"]

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    """`Trainer`, whose import takes seconds, when first asked for; and for what PEFT has and this has not, the reason."""
    if name in NOT_HERE:
        raise not_here(name)
    if name != "Trainer":
        raise AttributeError(f"module 'twofold.peft' has no '{name}'; docs/peft.md lists what it has of PEFT's names")
    return importlib.import_module("twofold.peft.resuming").Trainer
