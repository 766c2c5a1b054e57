"""PEFT's `LoraConfig`: its names, its defaults, and a sentence for each setting that is not done here."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from torch import nn

from twofold import atomic
from twofold.adapter.config import LoraConfig as OurConfig
from twofold.adapter.config import Names
from twofold.adapter.files import CONFIG
from twofold.adapter.peft_config import NOT_DONE as FILES_NOT_DONE
from twofold.adapter.peft_config import parse_config
from twofold.errors import AdapterFileError, ConfigError, UserError, did_you_mean


class TaskType(StrEnum):
    """What a model is for, in PEFT's words; kept in the adapter's config."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """The one kind there is."""

    LORA = "LORA"


_Q_AND_V = ("q_proj", "v_proj")
QUERY_AND_VALUE: dict[str, Names] = {
    **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", "stablelm", "gemma", "gemma2", "gemma3_text"), _Q_AND_V),
    **dict.fromkeys(("qwen2", "qwen3", "opt", "bart", "gptj", "gpt_neo"), _Q_AND_V),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "falcon"), ("query_key_value",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "phi": (*_Q_AND_V, "fc1", "fc2"),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "codegen": ("qkv_proj",),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
}
"""What PEFT adapts in a family when `target_modules` is not given."""

HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that PEFT trains whole, by task: a new one holds random values."""

NOT_DONE = FILES_NOT_DONE | {
    "velora_config": "VeLoRA is not done; freeze_a keeps no inputs for the gradient either",
    "corda_config": "CorDA changes the base; take init_lora_weights='eva' from data, or 'pissa'",
    "eva_config": "EVA's settings are those of twofold.recipes.starts, which computes its start",
    "lora_ga_config": "LoRA-GA's settings are those of twofold.recipes.starts, which computes its start",
    "loftq_config": "LoftQ's start is computed by twofold.recipes.starts",
}
"""PEFT's settings that must stay empty, each with the way out."""

NO_EFFECT = {"peft_type", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"}
"""PEFT's settings that are accepted and dropped: they describe, or belong to those that must be empty."""


class _Settings(type):
    """Looks at the settings before Python would refuse unknown ones without a word of help, and drops those of no effect."""

    def __call__(cls, **settings: Any) -> Any:
        ours = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        known = [*ours, *NOT_DONE, *NO_EFFECT]
        problems = [f"LoraConfig has no '{name}'{did_you_mean(name, known)}" for name in settings if name not in known]
        problems += [f"{name}: {why}" for name, why in NOT_DONE.items() if settings.get(name)]
        if problems:
            raise ConfigError("; ".join(problems))
        taken = {name: value for name, value in settings.items() if name in ours}
        return super().__call__(**{n: tuple(sorted(v)) if isinstance(v, set) else v for n, v in taken.items()})


@dataclass(frozen=True, kw_only=True)
class LoraConfig(OurConfig, metaclass=_Settings):
    """PEFT's settings with PEFT's defaults; those that Twofold does not do are refused with the reason, unless empty.

    Attributes:
        task_type: what the model is for; with one that has a new head, this is trained whole.
        base_model_name_or_path, revision: the base, as told in the file.
        fan_in_fan_out: of no effect, for the layer itself says how its weight lies.
        inference_mode: of no effect; a loaded adapter learns if `is_trainable` says so.
    """

    r: int = 8
    lora_alpha: float | int = 8
    target_modules: Names | None = None  # type: ignore[assignment]
    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    fan_in_fan_out: bool = False
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.target_modules is not None:
            super().__post_init__()

    @property
    def peft_type(self) -> PeftType:
        """LORA, the one kind there is."""
        return PeftType.LORA

    def to_dict(self) -> dict[str, Any]:
        """Its settings by name."""
        return {"peft_type": self.peft_type, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def for_model(self, model: nn.Module) -> OurConfig:
        """Twofold's config, with PEFT's targets for the family where none are given, and the task's head trained whole."""
        given = {f.name: getattr(self, f.name) for f in fields(OurConfig)}
        family = getattr(getattr(model, "config", None), "model_type", None)
        if given["target_modules"] is None:
            others = () if self.target_parameters or self.trainable_token_indices else None
            given["target_modules"] = QUERY_AND_VALUE.get(str(family), others)
        if given["target_modules"] is None:
            raise ConfigError(
                f"target_modules is not given, and there is no usual choice for '{family}'; try 'all-linear'"
            )
        saved = tuple(self.modules_to_save or ())
        heads = [h for h in HEADS.get(str(self.task_type), ()) if h not in saved and hasattr(model, h)]
        return OurConfig(**{**given, "modules_to_save": (*saved, *heads) or None})

    @classmethod
    def of(cls, config: OurConfig, **told: Any) -> LoraConfig:
        """Twofold's config in PEFT's shape, with what else is known of it."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(OurConfig)}, **told)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> LoraConfig:
        """The config of an adapter's folder or hub id."""
        file = folder_of(pretrained_model_name_or_path, Hub(subfolder, revision, token, cache_dir)) / CONFIG
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AdapterFileError(f"{file} cannot be read as an adapter's config: {error}") from error
        told = {k: raw.get(k) for k in ("task_type", "base_model_name_or_path", "revision")}
        return cls.of(parse_config(raw, file), **told, inference_mode=True)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the settings alone, as `adapter_config.json`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        ours_alone = {name: value for name, value in self.to_dict().items() if name != "freeze_a"}
        atomic.write_json(Path(save_directory) / CONFIG, ours_alone)


PeftConfig = LoraConfig


class Hub(NamedTuple):
    """Where in the hub an adapter lies, and how to ask for it."""

    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None


def folder_of(model_id: str | Path, hub: Hub) -> Path:
    """A local folder as it is, or the folder that a hub id is downloaded to.

    Raises:
        UserError: there is neither.
    """
    folder = Path(model_id)
    if not folder.is_dir():
        try:
            found = snapshot_download(str(model_id), revision=hub.revision, token=hub.token, cache_dir=hub.cache_dir)
        except (OSError, ValueError) as error:
            raise UserError(
                f"'{model_id}' is neither a folder nor an adapter that the hub can be asked for: {error}"
            ) from error
        folder = Path(found)
    return folder / hub.subfolder if hub.subfolder else folder
