"""What a user should know of an adapter before it is used, each with a code.

| code | severity | of |
|---|---|---|
| dead | warning | a module whose update is zero |
| rank-deficient | warning | directions that are rounding, or more than the weight has |
| rank-mismatch | error | factors whose rank is not the config's, or of which nothing tells whose they are |
| odd-scale | warning | alpha / r far from what is usual |
| unknown-tensor | error | tensors that the config has no word for |
| target-without-tensors | warning | an entry of target_modules for which the file holds nothing |
| whole | note | tensors that are no factors |
| dora | warning | figures of B·A alone |
| vllm-*, gguf-*, mlx-* | note | what these engines and formats do not take, or take otherwise |

With a base there are also no-fingerprint, foreign-base, unmatched-module, wrong-shape and target-ignored (`against_base`); a NaN
is not-finite.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from twofold.adapter.files import AdapterFiles
from twofold.adapter.keys import PREFIX
from twofold.adapter.names import matches
from twofold.adapter.updates import unresolved
from twofold.adapter.whole import MAGNITUDES, unknown_said, whole_names
from twofold.lowrank.factors import LowRank

ROUNDING = 1e-7
"""Directions smaller than this share of the largest are float32's rounding."""
USUAL_SCALES = (1 / 16, 16.0)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank; an adapter's rank may be no larger than the one chosen."""
LAYER = re.compile(r"\.layers\.\d+\.")
"""In the path of every module that mlx-lm puts an adapter on."""
HEAD = "lm_head"
"""What the families that are written as GGUF call a decoder's head."""


@dataclass(frozen=True)
class Finding:
    """Something that a user should know of an adapter: `severity` is error, warning or note."""

    severity: str
    code: str
    message: str


def lint_update(name: str, update: LowRank, values: Tensor) -> Iterator[Finding]:
    """What the factors of one module say."""
    if values[0] == 0:
        yield Finding("warning", "dead", f"'{name}' changes nothing: its update is zero")
        return
    if not update.finite:
        yield Finding("error", "not-finite", f"'{name}' has an update of values that float32 cannot hold")
    real = int((values > ROUNDING * values[0]).sum())
    if real < update.rank:
        yield Finding("warning", "rank-deficient", f"'{name}' uses {real} of its {update.rank} directions")
    low, high = USUAL_SCALES
    if not low <= abs(update.scale) <= high:
        said = f"'{name}' has the scale {update.scale:g}; usual are {low:g} to {high:g}, so is lora_alpha meant so?"
        yield Finding("warning", "odd-scale", said)


def lint_values(files: AdapterFiles) -> Iterator[Finding]:
    """Tensors that are no numbers, be they factors or not."""
    for key in files.tensors.nonfinite():
        yield Finding("error", "not-finite", f"'{key.removeprefix(PREFIX)}' holds NaN or infinity")


def lint_config(files: AdapterFiles, updates: Mapping[str, LowRank]) -> Iterator[Finding]:
    """What the config says, by itself and beside the tensors."""
    config = files.config
    if config.use_dora:
        said = "these figures are of B·A alone: DoRA also sets the lengths of the rows, for which the base's weights are needed"
        yield Finding("warning", "dora", said)
    yield from _targets(files)
    if unknown := unknown_said(files):
        yield Finding("error", "unknown-tensor", unknown)
    elif whole := sorted({module for module, suffix in whole_names(files) if suffix != MAGNITUDES}):
        said = f"held whole (biases, modules_to_save, tokens), and no part of these figures: {', '.join(whole[:4])}"
        yield Finding("note", "whole", said + (f" and {len(whole) - 4} more" if len(whole) > 4 else ""))
    yield from (Finding("error", "rank-mismatch", said) for said in unresolved(files).values())
    yield from _vllm(files)
    yield from _gguf(files, updates)
    yield from _mlx(files, updates)


def _targets(files: AdapterFiles) -> Iterator[Finding]:
    """Entries of a list that no module in the file bears."""
    targets = files.config.target_modules
    if isinstance(targets, str) or files.config.target_parameters or files.config.trainable_token_indices:
        return
    for entry in targets:
        if not any(matches((entry,), module) for module in files.modules()):
            said = f"target_modules names '{entry}', but the file holds nothing for it: it did nothing"
            yield Finding("warning", "target-without-tensors", said)


def _vllm(files: AdapterFiles) -> Iterator[Finding]:
    """By the ranks in the config, as vLLM itself judges."""
    config = files.config
    r = max(config.r, *config.rank_pattern.values(), 1)
    if r > VLLM_RANKS[-1]:
        yield Finding(
            "note", "vllm-rank", f"rank {r} is more than vLLM takes ({VLLM_RANKS[-1]}); twofold resize lowers it"
        )
    elif r not in VLLM_RANKS:
        needed = next(n for n in VLLM_RANKS if n >= r)
        yield Finding("note", "vllm-rank", f"rank {r} is filled up in vLLM, which needs --max-lora-rank {needed}")
    held = [
        ("vllm-dora", config.use_dora, "DoRA"),
        ("vllm-bias", config.bias != "none" or config.lora_bias, "biases"),
        ("vllm-whole-modules", bool(config.modules_to_save), "modules_to_save"),
        ("vllm-embedding", _has_embedding(files), "factors of an embedding"),
        ("vllm-tokens", bool(config.trainable_token_indices), "trainable_token_indices"),
        ("vllm-experts", bool(config.target_parameters), "target_parameters"),
    ]
    for code, is_held, what in held:
        if is_held:
            yield Finding(
                "note", code, f"vLLM refuses adapters with {what}; serve the merged model there (twofold merge)"
            )
    if outside := [module for module in _with_factors(files) if "layers." not in module]:
        said = f"vLLM adapts a decoder's layers alone, and {', '.join(outside[:4])} lies outside"
        yield Finding("note", "vllm-outside", f"{said}; serve the merged model there (twofold merge)")


def _gguf(files: AdapterFiles, updates: Mapping[str, LowRank]) -> Iterator[Finding]:
    """A GGUF adapter has one alpha, and its readers divide it by each tensor's rank."""
    config = files.config
    wrong = [n for n, u in updates.items() if abs(config.lora_alpha / u.rank - u.scale) > 1e-6 * abs(u.scale)]
    if wrong:
        said = (
            f"GGUF holds one alpha and no rsLoRA, so llama.cpp's own converter would scale '{wrong[0]}' and {len(wrong) - 1} more "
            "wrongly; twofold export folds the scale in"
        )
        yield Finding("note", "gguf-scale", said)
    for kind, what in _beside_factors(files):
        yield Finding("note", f"gguf-{kind}", f"GGUF adapters hold no {what}; merge it instead (twofold merge)")
    if HEAD in _with_factors(files):
        said = f"GGUF adapters hold no factors of '{HEAD}' where it is the embedding; merge it there instead (twofold merge)"
        yield Finding("note", "gguf-head", said)


def _mlx(files: AdapterFiles, updates: Mapping[str, LowRank]) -> Iterator[Finding]:
    if len({(u.rank, round(u.scale, 9)) for u in updates.values()}) > 1:
        yield Finding(
            "note", "mlx-rank", "MLX has one rank and one scale for all modules; smaller ranks need filling up"
        )
    for kind, what in _beside_factors(files):
        yield Finding("note", f"mlx-{kind}", f"MLX adapters hold no {what}; merge it instead (twofold merge)")
    if outside := [module for module in _with_factors(files) if not LAYER.search(module)]:
        said = f"mlx-lm adapts a decoder's layers alone, and {', '.join(outside[:4])} lies outside"
        yield Finding("note", "mlx-outside", f"{said}; merge it instead (twofold merge)")


def _beside_factors(files: AdapterFiles) -> Iterator[tuple[str, str]]:
    """What an adapter is besides factors of linear layers, with its code."""
    config = files.config
    held = [
        ("dora", config.use_dora, "DoRA"),
        ("whole", bool(config.modules_to_save) or config.bias != "none" or config.lora_bias, "biases or whole modules"),
        ("embedding", _has_embedding(files), "factors of an embedding"),
        ("tokens", bool(config.trainable_token_indices), "tokens of its own"),
        ("experts", bool(config.target_parameters), "factors of stacked experts (target_parameters)"),
    ]
    yield from ((kind, what) for kind, is_held, what in held if is_held)


def _has_embedding(files: AdapterFiles) -> bool:
    return any("lora_embedding" in suffix for keys in files.modules().values() for suffix in keys)


def _with_factors(files: AdapterFiles) -> list[str]:
    """The modules, but for embeddings and those that are trained whole."""
    return [module for module, keys in files.modules().items() if any(k.endswith("lora_A.weight") for k in keys)]
