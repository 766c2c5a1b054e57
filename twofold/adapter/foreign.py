"""Adapters in the layouts of kohya's scripts and of diffusers: one safetensors file without a config.

The scale of a module is ``alpha / r``. Kohya keeps an alpha beside each module's factors, and means r where there is none.
Diffusers keeps PEFT's whole config in the file's header (``lora_adapter_metadata``, by part of the pipeline); a file that says
nothing means r too, but one that has alphas for some modules of a part and not for others means different things to its readers.

The model may be the parts of a pipeline as modules of their names (``nn.ModuleDict({"unet": pipe.unet, ...})``), or one part alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twofold.adapter.attach import Made, made_shares
from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.layouts import DIFFUSERS, Named, Role, by_module, module_of_part, resolved
from twofold.adapter.peft_config import exceptions, names_in_full, parse_config
from twofold.adapter.shapes import ModuleShape, module_shapes
from twofold.adapter.target import targets_of
from twofold.errors import AdapterFileError
from twofold.lowrank.spectral_init import is_subtracted
from twofold.tensorfile import TensorFile, nonfinite

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's config in the file's header, as JSON: ``<part>.<setting>``, or the setting alone for one part."""
ROLE_OF: dict[str, Role] = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
}
"""The role of a share's tensors, by PEFT's suffix."""


def foreign_file(path: Path) -> Path | None:
    """The file in one of these layouts that a path means: itself, or the one that diffusers puts into a folder."""
    inside = path / "pytorch_lora_weights.safetensors"
    found = inside if inside.is_file() else path
    return found if found.is_file() and found.suffix == ".safetensors" else None


def read_foreign(model: nn.Module, path: Path, name: str) -> tuple[LoraConfig, dict[str, Made]]:
    """The shares that such a file gives to a model, which stays as it is.

    Returns:
        The config that says the same, whose ranks and alphas are by module; and the shares, by module.

    Raises:
        AdapterFileError: names that fit no module or several, tensors that are missing, left over or of the wrong shape, scales
            that cannot be known: all of them in one message.
    """
    file = TensorFile(path)
    shapes = module_shapes(model)
    listed, problems = by_module(file.shapes)
    _check_readable(path, file, listed, shapes)
    found, unresolved = resolved(listed, shapes)
    problems += unresolved
    for module, one in found.items():
        problems += [f"'{one.name}' has no {role}" for role in ("A", "B") if role not in one.keys]
        if shapes[module].kind not in ("linear", "conv1d", "convolution") or shapes[module].groups > 1:
            problems.append(f"'{module}' is neither linear nor a convolution without groups")
    if problems:
        raise AdapterFileError(_told(path, problems))
    config = _config(path, file, found, shapes)
    targets = targets_of(config, shapes, {module: shapes[module] for module in found})
    with torch.random.fork_rng(devices=[]):
        made = made_shares(model, targets, config, name)
    if problems := [p for module, one in found.items() for p in _fill(file, one, made[module])]:
        raise AdapterFileError(_told(path, problems))
    return config, made


def _check_readable(path: Path, file: TensorFile, listed: list[Named], shapes: Mapping[str, ModuleShape]) -> None:
    """Refuse a file that is not of these layouts, or that holds more than the model is."""
    if any(key.startswith("base_model.") for key in file.shapes):
        raise AdapterFileError(
            f"{path} holds PEFT's tensors, whose scales are in the adapter_config.json beside them; give the folder of both"
        )
    if not listed:
        raise AdapterFileError(_told(path, ["it holds no adapter that is known here"]))
    parts = sorted({one.part for one in listed if one.part})
    if len(parts) > 1 and not any(module_of_part(one, shapes) for one in listed):
        raise AdapterFileError(
            f"{path} is for the parts {', '.join(parts)} of a pipeline, and this model is none or one of them; load it onto "
            "nn.ModuleDict({'unet': pipe.unet, 'text_encoder': pipe.text_encoder}) or whatever the parts are"
        )


# ---------------------------------------------------------------------------------------------- ranks and scales


def _config(path: Path, file: TensorFile, found: Mapping[str, Named], shapes: Mapping[str, ModuleShape]) -> LoraConfig:
    """A config of the same meaning; alphas are such that alpha / r is the scale, whatever the file's own rule was."""
    ranks = {module: file.shapes[one.keys["B"]][1] for module, one in found.items()}
    told = _metadata(path, file)
    if told and any("alpha" in one.keys for one in found.values()):
        raise AdapterFileError(f"{path} says its scales twice: in its header, and as alphas beside its factors")
    if told:
        alphas = {module: _told_alpha(path, told, module, one, ranks[module], shapes) for module, one in found.items()}
    else:
        _check_scales(path, found)
        alphas = {module: _alpha(file, one, ranks[module]) for module, one in found.items()}
    r, alpha = statistics.mode(ranks.values()), statistics.mode(alphas.values())
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=names_in_full(found, shapes),
        rank_pattern=exceptions(ranks, r),
        alpha_pattern=exceptions(alphas, alpha),
        use_dora=_all_have(path, "magnitude", found),
        lora_bias=_all_have(path, "bias", found),
    )


def _check_scales(path: Path, found: Mapping[str, Named]) -> None:
    """Refuse diffusers' factors without an alpha where others of their part of the pipeline have one."""
    for part in dict.fromkeys(one.part for one in found.values() if one.layout is DIFFUSERS):
        silent = [one.name for one in found.values() if one.part == part and "alpha" not in one.keys]
        if 0 < len(silent) < sum(one.part == part for one in found.values()):
            raise AdapterFileError(
                f"{path} says an alpha for some modules but not for '{silent[0]}', so that its scale is not to be known; put one "
                "beside its factors"
            )


def _alpha(file: TensorFile, one: Named, r: int) -> float:
    """Of one module; kohya takes an alpha of 0 for r too."""
    return float(file.read(one.keys["alpha"])) or float(r) if "alpha" in one.keys else float(r)


def _all_have(path: Path, role: Role, found: Mapping[str, Named]) -> bool:
    """Whether the modules have tensors of this role."""
    having = [one for one in found.values() if role in one.keys]
    without = [one.name for one in found.values() if role not in one.keys]
    if having and without:
        raise AdapterFileError(
            f"{path} has '{having[0].keys[role]}' but no such tensor for '{without[0]}'; an adapter has it for all modules or none"
        )
    return bool(having)


def _metadata(path: Path, file: TensorFile) -> dict[str, LoraConfig]:
    """PEFT's config by part of the pipeline, "" for a file of one part; empty where the header holds none."""
    if METADATA not in file.metadata:
        return {}
    source = path / METADATA
    try:
        raw = json.loads(file.metadata[METADATA])
        settings = [(*key.rpartition(".")[::2], value) for key, value in raw.items()]
    except (ValueError, AttributeError) as error:
        raise AdapterFileError(f"{source} is not a table in JSON: {error}") from error
    by_part: dict[str, dict[str, Any]] = {}
    for part, setting, value in settings:
        by_part.setdefault(part, {})[setting] = value
    found = {part: parse_config(values, source) for part, values in by_part.items()}
    if any(is_subtracted(config.init_lora_weights) for config in found.values()):
        raise AdapterFileError(
            f"{source}: its start changed the base when training began; have it converted by PEFT first"
        )
    return found


def _told_alpha(
    path: Path, told: Mapping[str, LoraConfig], module: str, one: Named, r: int, shapes: Mapping[str, ModuleShape]
) -> float:
    """Alpha of one module by the header's config of its part, such that alpha / r is the scale."""
    config = told.get(one.part or "", told.get(""))
    if config is None:
        raise AdapterFileError(f"{path / METADATA} says nothing of '{one.part or one.name}'")
    there = module_of_part(one, shapes)
    known = resolve(config, module.removeprefix(f"{there}.") if there else module)
    if known.r != r:
        raise AdapterFileError(f"{path}: '{one.name}' has rank {r} in the tensors but {known.r} by the header")
    return known.scale * r


# ---------------------------------------------------------------------------------------------- values


def _fill(file: TensorFile, one: Named, made: Made) -> list[str]:
    """Give a module its tensors; what is wrong with them."""
    problems: list[str] = []
    values = {}
    wanted = made.share.saved(made.base)
    for suffix, tensor in wanted.items():
        key = one.keys[ROLE_OF[suffix]]
        given = _with_mid(file, one) if ROLE_OF[suffix] == "A" else file.read(key)
        if _squeezed(given.shape) != _squeezed(tensor.shape):
            problems.append(f"'{key}' has shape {tuple(given.shape)} where this model needs {tuple(tensor.shape)}")
            continue
        values[suffix] = given.reshape(tensor.shape).clone()
    problems += [f"'{one.name}' ({suffix}) holds NaN or infinity" for suffix in nonfinite(values)]
    if not problems:
        made.share.load(made.base, values)
    return problems


def _with_mid(file: TensorFile, one: Named) -> Tensor:
    """A, or the product of LoCon's two convolutions: a pointwise one, and one with the kernel after it.

    A[s, c, k…] = Σ_j mid[s, j, k…] down[j, c]: a convolution after a pointwise one is a convolution.
    """
    down = file.read(one.keys["A"])
    if "mid" not in one.keys:
        return down
    mid, pointwise = file.read(one.keys["mid"]).float(), down.float().flatten(1)
    if mid.shape[1] != len(pointwise):
        return mid  # whose shape will be told
    return torch.einsum("sj...,jc->sc...", mid, pointwise)


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    """Without trailing ones: a linear map and a convolution of one point have the same factors."""
    sizes = list(shape)
    while len(sizes) > 1 and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _told(path: Path, problems: list[str]) -> str:
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    return f"{path} does not fit this model: {'; '.join(problems[:8])}{more}"
