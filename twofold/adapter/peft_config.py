"""PEFT's `adapter_config.json`, both ways: nothing is skipped on reading, and nothing written can change its meaning."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from twofold.adapter.attach import adapter_layers, config_of
from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.names import matcher
from twofold.adapter.shapes import module_shapes
from twofold.adapter.target import adapted_modules, adapted_names
from twofold.config import build
from twofold.errors import AdapterFileError
from twofold.layers.linear import LoraConv1D
from twofold.lowrank.spectral_init import WEIGHT_STARTS, is_subtracted

OURS_TOO = {f.name for f in fields(LoraConfig)}
INERT: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (True, False),
    "inference_mode": (True, False),
    "qalora_group_size": (16,),
}
"""Keys of PEFT's config that change nothing here at these values; others must be empty, false or absent."""
DESCRIPTIVE = {"peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping"}
DESCRIPTIVE |= {"megatron_core", "runtime_config"}
PAST = {"eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config"}
"""Keys of PEFT's config that say how the training began or what it kept for the gradient: of a trained adapter, nothing."""
PAST_TENSORS = ("lora_velora_embed",)
"""Endings of tensors in PEFT's files that only the gradient of a training needs."""
NOT_DONE = {
    "layer_replication": "layers are not doubled; build the longer model first",
    "megatron_config": "Megatron's parallel layers are not adapted",
    "use_qalora": "QALoRA is not done; take plain LoRA over the quantised base",
    "use_bdlora": "BD-LoRA is not done; take plain LoRA",
    "alora_invocation_tokens": "aLoRA is not done; take plain LoRA",
    "monteclora_config": "MonteCLoRA is not done; take plain LoRA",
    "kasa_config": "KaSA cuts the base's own weights down; take plain LoRA, or PiSSA",
    "arrow_config": "Arrow's routing is not done; choose adapters by set_adapter or adapter_names",
}
"""Keys of PEFT's config that must be empty, each with the way out."""


@dataclass(frozen=True)
class Kept:
    """What an adapter's config says of its base, and nothing in `LoraConfig` does.

    Attributes:
        base_name, revision: what the base is called, and which of its revisions on a hub it is.
        task: what it is for, in PEFT's words.
        fan_in_fan_out: whether adapted weights lie transposed, as Hugging Face's Conv1D has them.
    """

    base_name: str | None = None
    revision: str | None = None
    task: str | None = None
    fan_in_fan_out: bool = False


def parse_config(raw: Mapping[str, Any], source: Path) -> LoraConfig:
    """PEFT's JSON as a `LoraConfig`; a feature that is not supported is an error, never skipped."""
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterFileError(f"{source} describes a {kind} adapter; only LORA adapters are supported")
    foreign = [k for k, v in raw.items() if k not in OURS_TOO | DESCRIPTIVE | PAST and v and v not in INERT.get(k, ())]
    if foreign:
        listed = ", ".join(f"{k}={raw[k]!r}" for k in sorted(foreign))
        why = "; ".join(NOT_DONE[k] for k in sorted(foreign) if k in NOT_DONE)
        raise AdapterFileError(
            f"{source} uses what this version of Twofold does not support: {listed}" + (f" ({why})" if why else "")
        )
    values = {k: v for k, v in raw.items() if k in OURS_TOO and v is not None}
    if values.get("init_lora_weights") not in (None, True, "gaussian", *WEIGHT_STARTS):
        values["init_lora_weights"] = _harmless_start(values["init_lora_weights"], source)
    return build(LoraConfig, values, source=str(source))


def _harmless_start(start: Any, source: Path) -> bool:
    """Starts that left the base alone are past and do not matter; the others changed the base that this fits.

    PiSSA's and OLoRA's change can be computed again from the base, whoever loads the adapter onto one does that.
    """
    if start in (False, "orthogonal", "eva", "mica"):
        return True
    raise AdapterFileError(
        f"{source}: init_lora_weights={start!r} changed the base when training began, so the adapter does not fit the "
        "plain base; convert it with PEFT (save_pretrained(path_initial_model_for_weight_conversion=...)) first"
    )


def peft_config(model: nn.Module, name: str, base_name: str | None) -> dict[str, Any]:
    """The adapter's config as PEFT reads it back, with nothing in it that could change meaning on the way."""
    config = as_plain(config_of(model, name))
    shapes = module_shapes(model)
    adapted = adapted_modules(config, shapes)
    layers = dict(adapter_layers(model))
    ranked = adapted_names(config, shapes)
    settled = with_changes(
        config,
        target_modules=shortest_names(adapted, shapes),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=_saved_by_peft(config.modules_to_save or (), shapes) or None,
        rank_pattern=_stable(config.rank_pattern, ranked, lambda c, m: resolve(c, m).r, config, "rank_pattern"),
        alpha_pattern=_stable(config.alpha_pattern, ranked, lambda c, m: resolve(c, m).alpha, config, "alpha_pattern"),
    )
    transposed = any(isinstance(layers[m], LoraConv1D) for m in adapted)
    return in_peft_words(settled, Kept(base_name, task=task_of(model), fan_in_fan_out=transposed))


def in_peft_words(config: LoraConfig, kept: Kept) -> dict[str, Any]:
    """What `adapter_config.json` says of a config whose targets and patterns mean the same in PEFT as here."""
    targets, layers = config.target_modules, config.layers_to_transform
    said: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": kept.task,
        "base_model_name_or_path": kept.base_name,
        "revision": kept.revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": _as_int(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "modules_to_save": list(config.modules_to_save) if config.modules_to_save else None,
        "target_parameters": list(config.target_parameters) if config.target_parameters else None,
        "trainable_token_indices": _tokens(config),
        "ensure_weight_tying": config.ensure_weight_tying,
        "init_lora_weights": config.init_lora_weights,
        "fan_in_fan_out": kept.fan_in_fan_out,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {k: _as_int(v) for k, v in config.alpha_pattern.items()},
    }
    excluded, lists = config.exclude_modules, config.layers_pattern
    narrowed = {
        "exclude_modules": excluded if isinstance(excluded, str) else list(excluded or ()),
        "layers_to_transform": [layers] if isinstance(layers, int) else list(layers or ()),
        "layers_pattern": lists if isinstance(lists, str) else list(lists or ()),
    }
    return {**said, **{key: value for key, value in narrowed.items() if value}}


def as_plain(config: LoraConfig) -> LoraConfig:
    """The config of the tensors that `Share.plain` gives: starts are past, and one that the update is counted from doubles the
    rank. Alpha grows with it so that the scale stays.
    """
    start = config.init_lora_weights
    if not is_subtracted(start) or config.freeze_a:
        return with_changes(config, init_lora_weights=start if start == "gaussian" else True, freeze_a=False)
    louder = math.sqrt(2) if config.use_rslora else 2
    return with_changes(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=louder * config.lora_alpha,
        rank_pattern={k: 2 * r for k, r in config.rank_pattern.items()},
        alpha_pattern={k: louder * a for k, a in config.alpha_pattern.items()},
    )


def _tokens(config: LoraConfig) -> dict[str, list[int]] | list[int] | None:
    given = config.trainable_token_indices
    if not given:
        return None
    return {name: list(rows) for name, rows in given.items()} if isinstance(given, Mapping) else list(given)


def shortest_names(adapted: Iterable[str], known: Iterable[str]) -> list[str] | str:
    """The last parts of the names where they match exactly the adapted ones of all modules known, else the names in full."""
    names, known = set(adapted), set(known)
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    return endings if _matched(endings, known) == names else names_in_full(names, known)


def names_in_full(adapted: Iterable[str], known: Iterable[str]) -> list[str] | str:
    """The names, or one expression of them where one name is the end of another's, which a list would match too."""
    names = sorted(adapted)
    return names if _matched(names, known) == set(names) else "|".join(re.escape(n) for n in names)


def _saved_by_peft(entries: Sequence[str], known: Iterable[str]) -> Sequence[str]:
    """The entries, or the names in full where PEFT would find more, since to it an entry may begin in the middle of a word."""
    names, known = _matched(list(entries), known), set(known)
    return entries if {n for n in known if n.endswith(tuple(entries))} == names else sorted(names)


def _matched(patterns: list[str], names: Iterable[str]) -> set[str]:
    return set(filter(matcher(patterns), names))


def _stable(
    patterns: Mapping[str, Any],
    adapted: Iterable[str],
    value: Callable[[LoraConfig, str], Any],
    config: LoraConfig,
    field_name: str,
) -> dict[str, Any]:
    """The patterns, sorted as PEFT will sort them, if every module still gets its value; else one name per module."""
    in_order = dict(sorted(patterns.items()))
    as_sorted = with_changes(config, **{field_name: in_order})
    if all(value(as_sorted, m) == value(config, m) for m in adapted):
        return in_order
    default = config.r if field_name == "rank_pattern" else config.lora_alpha
    return exceptions({m: value(config, m) for m in adapted}, default)


def exceptions(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Anchored patterns for the modules whose value is not the default: each can match its own module only."""
    return {f"^{re.escape(m)}": v for m, v in values.items() if v != default}


def with_changes(config: LoraConfig, **changes: Any) -> LoraConfig:
    return LoraConfig(**{**{f.name: getattr(config, f.name) for f in fields(config)}, **changes})


def _as_int(value: float | int) -> float | int:
    return int(value) if float(value).is_integer() else value


def task_of(model: nn.Module) -> str | None:
    """What a model is for, in PEFT's words, by the name of its class."""
    tasks = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
    }
    return next((task for ending, task in tasks.items() if type(model).__name__.endswith(ending)), None)
