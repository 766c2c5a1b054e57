"""A LoRA adapter as one file in the layout of kohya's scripts, which image tools read: factors and an alpha for each module.

Every module has an alpha of its own, so that ranks, alphas and rsLoRA come out right without touching a factor: the scale there is
``alpha / r``. Names are `adapter/layouts.py`'s: a module's path with underscores for dots, behind the part of a pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from twofold.adapter.config import resolve
from twofold.adapter.files import AdapterFiles
from twofold.adapter.layouts import KOHYA
from twofold.adapter.updates import factors, has_groups, pairs_of
from twofold.adapter.whole import COPY
from twofold.errors import ConfigError, ProofError
from twofold.tensorfile import TensorFile, write_tensors

PARTS = {module: part for part, modules in KOHYA.parts.items() for module in modules[:1]} | {
    "text_encoder": "lora_te",
    "transformer": "lora_unet",
}
"""What kohya calls the parts of a pipeline, by their names in diffusers."""
ALONE = {
    "lora_unet": re.compile(r"(down_blocks|mid_block|up_blocks|transformer_blocks|single_transformer_blocks)\."),
    "lora_te": re.compile(
        r"(model|text_model|encoder|decoder|transformer)\.(.+\.)?(layers|h|block)\.\d+\.|layers\.\d+\."
    ),
}
"""Beginnings of names in a model that is one part alone: an image model, or one of text."""


def write_kohya(files: AdapterFiles, path: Path) -> float:
    """Write the file, read it back, and compare: the largest relative difference of a scale; the factors are the same bits.

    Raises:
        ConfigError: the adapter is more than factors, or a module's name fits no part of a pipeline.
        RunError: the file cannot be written.
        ProofError: what was read back is something else.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} should be a file that ends in .safetensors")
    modules = _modules(files)
    tensors: dict[str, Tensor] = {}
    for name, (down, up, scale) in modules.items():
        ends = KOHYA.endings
        tensors |= {f"{name}.{ends['A']}": down, f"{name}.{ends['B']}": up}
        tensors[f"{name}.{ends['alpha']}"] = torch.tensor(scale * len(down), dtype=torch.float32)
    r = max(len(down) for down, _, _ in modules.values())
    said = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(r),
        "ss_network_alpha": str(files.config.lora_alpha),
    }
    write_tensors(path, tensors, said)
    try:
        return _proved(path, modules)
    except ProofError:
        path.unlink()
        raise


def _modules(files: AdapterFiles) -> dict[str, tuple[Tensor, Tensor, float]]:
    """By kohya's name, A, B and the scale of each module."""
    others = sorted(
        {s for m in files.modules().values() for s in m if not s.endswith(("lora_A.weight", "lora_B.weight", COPY))}
    )
    if others or files.config.target_parameters:
        raise ConfigError(
            f"{files.path} has {', '.join(others) or 'experts (target_parameters)'} beside the factors of linear layers and "
            "convolutions, which are all that is written in kohya's layout; merge it into its base (twofold merge), or train "
            "without"
        )
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    for pair in pairs_of(files):
        if has_groups(files, pair):
            raise ConfigError(f"'{pair.name}' is a convolution with groups, which kohya's layout has no form for")
        name = kohya_name(pair.name)
        if name in found:
            raise ConfigError(f"two modules would both be called '{name}' in kohya's layout, which has no dots")
        (down, up), scale = factors(files, pair), resolve(files.config, pair.module).scale
        found[name] = (down, up * bool(scale), scale or 1.0)  # readers take an alpha of 0 for r
    return found


def kohya_name(module: str) -> str:
    """A module's name there.

    Raises:
        ConfigError: nothing tells which part of a pipeline it is in.
    """
    first, _, rest = module.partition(".")
    part = PARTS.get(first)
    if part is None or ALONE["lora_te"].match(module):
        part, rest = next((p for p, begins in ALONE.items() if begins.match(module)), None), module
    if part is None:
        raise ConfigError(
            f"'{module}' is in no part of a pipeline that is known here ({', '.join(PARTS)}), so kohya's layout has no name for it"
        )
    if part.startswith("lora_te") and rest.startswith("encoder.layers."):
        rest = f"text_model.{rest}"  # a level that CLIP's text encoders had before transformers 5, and have there
    return f"{part}{KOHYA.joint}{rest.replace('.', KOHYA.joint)}"


def _proved(path: Path, modules: Mapping[str, tuple[Tensor, Tensor, float]]) -> float:
    file, ends, worst = TensorFile(path), KOHYA.endings, 0.0
    for name, (down, up, scale) in modules.items():
        same = torch.equal(file.read(f"{name}.{ends['A']}"), down) and torch.equal(file.read(f"{name}.{ends['B']}"), up)
        found = float(file.read(f"{name}.{ends['alpha']}")) / len(down)
        worst = max(worst, abs(found - scale) / abs(scale) if scale else abs(found))
        if not same or not worst <= torch.finfo(torch.float32).eps:
            raise ProofError(f"'{name}' of {path}, read back, is not the adapter's; do not use it")
    return worst
