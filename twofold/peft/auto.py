"""PEFT's classes that load a base and its adapter by the adapter's name alone: one small thing, and a table of its kinds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from twofold.adapter.files import CONFIG
from twofold.base.load import locate
from twofold.errors import ConfigError
from twofold.peft.config import Hub, LoraConfig, TaskType, folder_of
from twofold.peft.model import PeftModel

LOADERS: dict[TaskType, str] = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}
"""By task, transformers' class that loads its base."""


@dataclass(frozen=True)
class AutoPeft:
    """One of the `AutoPeftModel...`: what `from_pretrained` loads is for `task`; None takes the adapter's own word for it."""

    task: TaskType | None = None

    def from_pretrained(
        self,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        **base_settings: Any,
    ) -> Any:
        """The base that the adapter's config names, with the adapter on it; the embedding grows to the adapter's own tokenizer.

        Args:
            base_settings: handed to transformers' `from_pretrained` of the base, such as `dtype` and `device_map`.

        Raises:
            ConfigError: the adapter is for another task, or does not say which or for which base.
        """
        hub = Hub(subfolder, revision, token, cache_dir)
        folder = folder_of(pretrained_model_name_or_path, hub)
        config = LoraConfig.from_pretrained(folder)
        if not config.base_model_name_or_path:
            raise ConfigError(
                f"{folder / CONFIG} names no base; load the base yourself, then PeftModel.from_pretrained"
            )
        base = getattr(transformers, self._loader(folder, config)).from_pretrained(
            locate(config.base_model_name_or_path), revision=config.revision or "main", token=token, **base_settings
        )
        if (folder / "tokenizer_config.json").is_file():
            tokens = len(AutoTokenizer.from_pretrained(folder))
            if tokens > base.get_input_embeddings().weight.shape[0]:
                base.resize_token_embeddings(tokens)
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable)

    def _loader(self, folder: Path, config: LoraConfig) -> str:
        """The name of transformers' class for the base."""
        told = TaskType(config.task_type) if config.task_type else None
        if self.task and told and told != self.task:
            raise ConfigError(f"the adapter at {folder} is for {told}, not {self.task}; take {auto_name(told)}")
        task = self.task or told
        mapping = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("auto_mapping") or {}
        named = str(mapping.get("base_model_class", ""))
        if task is None and not isinstance(getattr(transformers, named, None), type):
            raise ConfigError(
                f"{folder / CONFIG} says neither its task nor a class of transformers'; take one of "
                + ", ".join(auto_name(task) for task in LOADERS)
            )
        return LOADERS[task] if task else named


def auto_name(task: TaskType) -> str:
    """PEFT's name of the class for a task."""
    plain = LOADERS[task].removeprefix("AutoModel")
    return f"AutoPeftModel{plain or 'ForFeatureExtraction'}"


AUTO = {"AutoPeftModel": AutoPeft(), **{auto_name(task): AutoPeft(task) for task in LOADERS}}
"""All of them, by PEFT's names."""
