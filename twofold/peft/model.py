"""The model's methods, by PEFT's names.

`get_peft_model` returns the model it was given, whose class from then on is a subclass of its own with PEFT's methods added:
nothing is wrapped, so that transformers' Trainer, `generate` and `isinstance` see the model they know. `unload` and
`merge_and_unload` give it its first class back.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from twofold.adapter import attach as live
from twofold.adapter.files import load_adapter, write_into
from twofold.adapter.peft_config import task_of
from twofold.adapter.rows import rows
from twofold.errors import ConfigError
from twofold.merging.attached import Combination, add_combined
from twofold.merging.live import fold_in
from twofold.peft.arguments import check_inert
from twofold.peft.config import Hub, LoraConfig, folder_of
from twofold.peft.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status

Model = TypeVar("Model", bound=nn.Module)
BASE_ROW = "__base__"
NOTHING_LOST = 1e-6


def get_peft_model(
    model: Model,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Model:
    """Attach a new adapter to the model and give it PEFT's methods; the same object comes back.

    Raises:
        UserError: as `twofold.attach`; an argument asks for what is not done here.
    """
    check_inert(mixed=mixed, autocast_adapter_dtype=autocast_adapter_dtype)
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


class PeftModel(nn.Module):
    """PEFT's methods, mixed into the class of an adapted model."""

    @classmethod
    def from_pretrained(  # type: ignore[override, unused-ignore]
        cls,
        model: Model,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: object = None,
        *,
        torch_device: object = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> Model:
        """Load an adapter's folder or hub id onto a model; strict, as `twofold.load_adapter` is."""
        check_inert(
            config=config,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            key_mapping=key_mapping,
        )
        load_adapter(model, folder_of(model_id, Hub(subfolder, revision, token, cache_dir)), adapter_name)
        _set_learning(model, adapter_name, is_trainable)
        return _with_methods(model)

    # ------------------------------------------------------------------------------------ what there is

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The config of each adapter."""
        base = getattr(getattr(self, "config", None), "name_or_path", None) or None
        return {
            name: LoraConfig.of(live.config_of(self, name), task_type=task_of(self), base_model_name_or_path=base)
            for name in live.attached(self)
        }

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the adapter that counts."""
        return self.peft_config[self.active_adapter]

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

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of each adapted module."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of all adapters as a whole."""
        return get_model_status(self)

    # ------------------------------------------------------------------------------------ several adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach one more; those that were active stay so."""
        check_inert(autocast_adapter_dtype=autocast_adapter_dtype)
        with _same_choice(self):
            live.attach(self, peft_config.for_model(self), adapter_name)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: object = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: object = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        """Load one more; those that were active stay so. It lies on the base's devices, whatever `torch_device` says."""
        check_inert(
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            key_mapping=key_mapping,
        )
        with _same_choice(self):
            load_adapter(self, folder_of(model_id, Hub(subfolder, revision, token, cache_dir)), adapter_name)
        _set_learning(self, adapter_name, is_trainable)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let one adapter count, or the sum of several; they learn, unless `inference_mode`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        live.activate(self, dict.fromkeys(names, 1.0))
        if inference_mode:
            self.set_requires_grad(names, False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters learn, or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            _set_learning(self, name, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; with none left the model is the bare base, with PEFT's methods still."""
        live.detach(self, adapter_name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """The bare base, for the length of a `with` block."""
        return live.disabled(self)

    def disable_adapter_layers(self) -> None:
        """The bare base, until `enable_adapter_layers`."""
        for adapters in live.adapters_of(self):
            adapters.enabled = False

    def enable_adapter_layers(self) -> None:
        """The active adapters again."""
        for adapters in live.adapters_of(self):
            adapters.enabled = True

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add the weighted sum of several as one more adapter, of their true updates, never of their factors apart.

        A truncation that loses something warns, with the share of the energy that is lost. The last two of the `svd_` settings
        choose how PEFT computes a decomposition, and do nothing here.

        Raises:
            ConfigError: the type is not known, `linear` would not be exact, or an adapter is more than factors.
        """
        check_inert(svd_clamp=svd_clamp, majority_sign_method=majority_sign_method)
        if len(adapters) != len(weights):
            raise ConfigError(f"{len(adapters)} adapters have {len(weights)} weights")
        how = Combination(combination_type.removesuffix("_svd"), svd_rank, 1.0 if density is None else density)
        with _same_choice(self):
            lost = add_combined(self, list(zip(adapters, weights, strict=True)), adapter_name, how)
        worst = max(lost, key=lost.__getitem__)
        if lost[worst] > NOTHING_LOST:
            warnings.warn(
                f"adapter '{adapter_name}' lost {lost[worst]:.1%} of the energy of the combined update of '{worst}', and less or "
                "as much elsewhere; a larger svd_rank loses less, and 'cat' nothing",
                stacklevel=2,
            )

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

    def save_pretrained(  # Trainer passes state_dict
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: object = None,
        *,
        state_dict: object = None,
        push_to_hub: bool = False,
    ) -> None:
        """Write every adapter, or these: "default" into the folder, each other into a subfolder of its name.

        The files hold plain updates whatever the start was, so nothing has to be converted.
        """
        check_inert(
            safe_serialization=safe_serialization, save_embedding_layers=save_embedding_layers, push_to_hub=push_to_hub
        )
        base = getattr(getattr(self, "config", None), "name_or_path", None) or None
        for name in selected_adapters or live.attached(self):
            folder = Path(save_directory) / ("" if name == live.DEFAULT_NAME else name)
            if is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                write_into(self, folder, name, base_name=base)


def _without_methods(model: nn.Module) -> nn.Module:
    model.__class__ = type(model).__mro__[2]
    return model


def _broken(weight: Tensor | None) -> bool:
    return weight is not None and not bool(torch.isfinite(weight).all())


@contextmanager
def _same_choice(model: nn.Module) -> Iterator[None]:
    before = live.active(model)
    yield
    live.activate(model, before)


def _set_learning(model: nn.Module, name: str, learns: bool) -> None:
    for share in live.shares(model, name).values():
        share.requires_grad_(learns)
