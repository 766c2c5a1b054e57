"""A face in PEFT's shape: scripts that say `from peft import LoraConfig, get_peft_model` run with this module's name instead.

Everything is done by Twofold's own functions; this file only has PEFT's names for them. `get_peft_model` returns the model it was
given, whose class from then on is a subclass of its own with PEFT's methods added: nothing is wrapped, so that transformers'
Trainer, `generate` and `isinstance` see the model they know. `unload` and `merge_and_unload` give it its first class back. What
differs from PEFT is in docs/peft.md.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from twofold.adapter import attach as live
from twofold.adapter.config import LoraConfig as OurConfig
from twofold.adapter.config import Names
from twofold.adapter.files import CONFIG, adapter_tensors, load_adapter, open_adapter, set_tensors, write_into
from twofold.adapter.rows import rows
from twofold.errors import ConfigError, UserError
from twofold.merging.concatenate import concatenate
from twofold.merging.live import fold_in

Model = TypeVar("Model", bound=nn.Module)
BASE_ROW = "__base__"


class TaskType(StrEnum):
    """What a model is for, in PEFT's words; kept in the adapter's config."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


QUERY_AND_VALUE: dict[str, Names] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("q_proj", "v_proj")
    ),
    **dict.fromkeys(("opt", "bart", "gptj", "gpt_neo", "stablelm"), ("q_proj", "v_proj")),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value",)),
    "gpt2": ("c_attn",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
}
"""What PEFT adapts in a family when `target_modules` is not given."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(OurConfig):
    """PEFT's settings with PEFT's defaults; what Twofold does not do has no field here.

    Attributes:
        task_type: what the model is for.
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
    def peft_type(self) -> str:
        """LORA, the one kind there is."""
        return "LORA"

    def for_model(self, model: nn.Module) -> OurConfig:
        """Twofold's config, with PEFT's targets for the family where none are given."""
        given = {f.name: getattr(self, f.name) for f in fields(OurConfig)}
        family = getattr(getattr(model, "config", None), "model_type", None)
        if given["target_modules"] is None:
            given["target_modules"] = QUERY_AND_VALUE.get(str(family))
        if given["target_modules"] is None:
            raise ConfigError(
                f"target_modules is not given, and there is no usual choice for '{family}'; try 'all-linear'"
            )
        return OurConfig(**given)

    @classmethod
    def from_pretrained(cls, model_id: str | Path, subfolder: str | None = None) -> LoraConfig:
        """The config of an adapter's folder or hub id."""
        folder = _folder(model_id, subfolder)
        files, raw = open_adapter(folder), json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        ours = {f.name: getattr(files.config, f.name) for f in fields(OurConfig)}
        told = {k: raw.get(k) for k in ("task_type", "base_model_name_or_path", "revision")}
        return cls(**ours, **told, inference_mode=True)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Not to be had without an adapter."""
        raise ConfigError(f"a config alone is not written to {save_directory}; call save_pretrained of the model")


PeftConfig = LoraConfig


def get_peft_model(model: Model, peft_config: LoraConfig, adapter_name: str = "default") -> Model:
    """Attach a new adapter to the model and give it PEFT's methods; the same object comes back.

    Raises:
        UserError: as `twofold.attach`.
    """
    live.attach(model, peft_config.for_model(model), adapter_name)
    return _with_methods(model)


def _with_methods(model: Model) -> Model:
    if not isinstance(model, PeftModel):
        model.__class__ = _with_face(cast(Any, type(model)))
    return model


@functools.cache
def _with_face(cls: type[Any]) -> type[Any]:
    """The class with PEFT's methods before its own; the signatures stay, by which Trainer chooses its columns."""

    def by_row(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(self: PeftModel, *args: Any, adapter_names: Sequence[str] | None = None, **named: Any) -> Any:
            with self._mixed(adapter_names):
                return method(self, *args, **named)

        return run

    own = {name: by_row(getattr(cls, name)) for name in ("forward", "generate") if hasattr(cls, name)}
    return type(f"Peft{cls.__name__}", (PeftModel, cls), {**own, "__module__": __name__})


class Incompatible(NamedTuple):
    """What `set_peft_model_state_dict` returns: both empty, or it would have raised."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class PeftModel(nn.Module):
    """PEFT's methods, mixed into the class of an adapted model."""

    @classmethod
    def from_pretrained(  # type: ignore[override, unused-ignore]
        cls,
        model: Model,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
    ) -> Model:
        """Load an adapter's folder or hub id onto a model; strict, as `twofold.load_adapter` is."""
        load_adapter(model, _folder(model_id, subfolder), adapter_name)
        _learn(model, adapter_name, is_trainable)
        return _with_methods(model)

    # ------------------------------------------------------------------------------------ what there is

    @property
    def peft_config(self) -> dict[str, OurConfig]:
        """The config of each adapter."""
        return {name: live.config_of(self, name) for name in live.attached(self)}

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that count now."""
        return list(live.active(self))

    @property
    def active_adapter(self) -> str:
        """The one that counts, or the first of several."""
        names = self.active_adapters
        if not names:
            raise ConfigError("no adapter is active; call set_adapter")
        return names[0]

    def get_base_model(self) -> nn.Module:
        """The model itself, for nothing is wrapped."""
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Parameters that learn, and all of them."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, learns in counts if learns), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """One line, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # ------------------------------------------------------------------------------------ several adapters

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig) -> None:
        """Attach one more; those that were active stay so."""
        with _same_choice(self):
            live.attach(self, peft_config.for_model(self), adapter_name)

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, *, subfolder: str | None = None
    ) -> None:
        """Load one more; those that were active stay so."""
        with _same_choice(self):
            load_adapter(self, _folder(model_id, subfolder), adapter_name)
        _learn(self, adapter_name, is_trainable)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let one adapter count, or the sum of several."""
        live.activate(self, adapter_name if isinstance(adapter_name, str) else dict.fromkeys(adapter_name, 1.0))

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; with none left the model is the bare base, with PEFT's methods still."""
        live.detach(self, adapter_name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """The bare base, for the length of a `with` block."""
        return live.disabled(self)

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "svd"
    ) -> None:
        """Add the weighted sum of several as one more adapter. Only `combination_type="cat"` is done here: it is exact.

        Raises:
            ConfigError: another type, or adapters that are more than factors.
        """
        if combination_type != "cat":
            raise ConfigError(
                f"combination_type '{combination_type}' is not done here; 'cat' is exact for any weights, at the sum of the ranks"
            )
        if len(adapters) != len(weights):
            raise ConfigError(f"{len(adapters)} adapters have {len(weights)} weights")
        with _same_choice(self):
            concatenate(self, dict(zip(adapters, weights, strict=True)), adapter_name)

    def _mixed(self, adapter_names: Sequence[str] | None) -> AbstractContextManager[None]:
        if adapter_names is None:
            return nullcontext()
        return rows(self, [None if name == BASE_ROW else name for name in adapter_names])

    # ------------------------------------------------------------------------------------ merging, saving

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the active adapters, or these, into weights beside the base's; `unmerge_adapter` restores every bit."""
        if adapter_names is not None:
            self.set_adapter(adapter_names)
        live.merge(self)
        broken = [n for n, layer in live.adapter_layers(self) if safe_merge and _broken(getattr(layer, "merged", None))]
        if broken:
            live.unmerge(self)
            raise ConfigError(f"merging makes NaN or infinity in '{broken[0]}'; nothing was merged")

    def unmerge_adapter(self) -> None:
        """Back to the base and its adapters, bit for bit."""
        live.unmerge(self)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The plain model with the active adapters, or these, in its weights."""
        if safe_merge:
            self.merge_adapter(adapter_names, safe_merge=True)
            self.unmerge_adapter()
        elif adapter_names is not None:
            self.set_adapter(adapter_names)
        fold_in(self)
        return _without_methods(self)

    def unload(self) -> nn.Module:
        """The plain base, every adapter off."""
        live.detach(self)
        return _without_methods(self)

    def save_pretrained(  # Trainer passes the last two
        self,
        save_directory: str | Path,
        selected_adapters: Sequence[str] | None = None,
        *,
        is_main_process: bool = True,
        state_dict: object = None,
    ) -> None:
        """Write every adapter, or these: "default" into the folder, each other into a subfolder of its name."""
        for name in selected_adapters or live.attached(self):
            folder = Path(save_directory) / ("" if name == live.DEFAULT_NAME else name)
            if is_main_process:
                write_into(
                    self, folder, name, base_name=getattr(getattr(self, "config", None), "name_or_path", None) or None
                )


def _without_methods(model: PeftModel) -> nn.Module:
    model.__class__ = type(model).__mro__[2]
    return model


def _broken(weight: Tensor | None) -> bool:
    return weight is not None and not bool(torch.isfinite(weight).all())


@contextmanager
def _same_choice(model: nn.Module) -> Iterator[None]:
    before = live.active(model)
    yield
    live.activate(model, before)


def _learn(model: nn.Module, name: str, learns: bool) -> None:
    for share in live.shares(model, name).values():
        share.requires_grad_(learns)


def _folder(model_id: str | Path, subfolder: str | None) -> Path:
    """A local folder as it is, or the folder that a hub id is downloaded to."""
    folder = Path(model_id)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(model_id)))
        except (OSError, ValueError) as error:
            raise UserError(
                f"'{model_id}' is neither a folder nor an adapter that the hub can be asked for: {error}"
            ) from error
    return folder / subfolder if subfolder else folder


# ---------------------------------------------------------------------------------------- helpers


def get_peft_model_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors by the keys of its file."""
    return adapter_tensors(model, adapter_name)


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> Incompatible:
    """Give an attached adapter other values. A key too many, too few or of another shape is an error."""
    set_tensors(model, peft_model_state_dict, adapter_name)
    return Incompatible([], [])


def prepare_model_for_kbit_training(
    model: Model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> Model:
    """Freeze the base and turn checkpointing on. No tensor of the base changes its type, as they would in PEFT."""
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        able = cast(Any, model)
        able.enable_input_require_grads()
        able.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(gradient_checkpointing_kwargs or {}))
    return model
