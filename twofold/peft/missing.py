"""PEFT's names for LoRA that are not here, each with the way out."""

from __future__ import annotations

from twofold.errors import ConfigError
from twofold.peft.config import NOT_DONE

_STARTS = "is computed before, by {} of twofold.recipes.starts, for twofold.attach(model, config, factors=...)"
_EVA = f"EVA's start {_STARTS.format('eva_start')}"
_LORA_GA = f"LoRA-GA's start {_STARTS.format('lora_ga_start')}"
_LOFTQ = f"LoftQ's start {_STARTS.format('loftq_start')}"
NOT_HERE = {
    **dict.fromkeys(("EvaConfig", "get_eva_state_dict", "initialize_lora_eva_weights"), _EVA),
    **dict.fromkeys(("LoraGAConfig", "preprocess_loraga"), _LORA_GA),
    **dict.fromkeys(("LoftQConfig", "replace_lora_weights_loftq"), _LOFTQ),
    **dict.fromkeys(("ArrowConfig", "create_arrow_model"), NOT_DONE["arrow_config"]),
    **dict.fromkeys(
        ("convert_to_lora", "save_as_lora", "PeftMixedModel"), "adapters other than LoRA are not done here"
    ),
    "BdLoraConfig": NOT_DONE["use_bdlora"],
    "KasaConfig": NOT_DONE["kasa_config"],
    "MontecloraConfig": NOT_DONE["monteclora_config"],
    "VeloraConfig": NOT_DONE["velora_config"],
    "LoraRuntimeConfig": "layers are not moved between devices for single products",
    "LoraModel": "nothing is wrapped; get_peft_model gives the model itself PEFT's methods",
    "find_kappa_target_modules": "name the targets, or take 'all-linear'",
}


class NotHereError(ConfigError, ImportError):
    """A name of PEFT's that this module does not have; an import error, so that `from ... import` shows the sentence."""


def not_here(name: str) -> NotHereError:
    """The error that says why."""
    return NotHereError(f"twofold.peft has no {name}: {NOT_HERE[name]}")
