"""What an adapter says to formats that know A, B and one scale, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.files import AdapterFiles
from twofold.adapter.whole import COPY
from twofold.errors import AdapterFileError, ConfigError, ProofError
from twofold.lowrank.factors import LowRank
from twofold.tensorfile import nonfinite

A, B = "lora_A.weight", "lora_B.weight"
PROVED = 1e-5
"""Largest relative error of factors that are read back: some roundings of float32, where a scale was folded into them."""


def plain_factors(files: AdapterFiles, format_: str) -> dict[str, LowRank]:
    """The update of each module with its true scale, patterns and rsLoRA taken into account.

    Raises:
        ConfigError: the adapter is more than factors of linear layers, which the format has no word for; names what and the way
            out.
        AdapterFileError: factors hold NaN or infinity.
    """
    others = sorted(
        {
            _word(suffix)
            for suffixes in files.modules().values()
            for suffix in suffixes
            if suffix not in (A, B) and not suffix.endswith(COPY)
        }
    )
    if files.config.target_parameters:
        others.append("experts (target_parameters)")
    if others:
        raise ConfigError(
            f"{files.path} has {', '.join(others)}, which {format_} cannot hold; merge it into its base (twofold merge) and use "
            "that, or train without"
        )
    found = {}
    for module, keys in sorted(files.modules().items()):
        down, up = (files.tensors.read(keys[k]).to(torch.float32) for k in (A, B))
        if broken := nonfinite({A: down, B: up}):
            raise AdapterFileError(f"'{module}' of {files.path} holds NaN or infinity in {broken[0]}; train it again")
        found[module] = LowRank(down, up, resolve(files.config, module).scale)
    return found


def _word(suffix: str) -> str:
    """What a user calls a tensor."""
    if "magnitude" in suffix:
        return "DoRA's magnitudes"
    if "embedding" in suffix:
        return "factors of an embedding"
    if "trainable_tokens" in suffix:
        return "tokens of its own"
    return "biases" if suffix.endswith("bias") else "whole modules (modules_to_save)"


def of_one_rank(updates: Mapping[str, LowRank], scale: float) -> dict[str, LowRank]:
    """The same updates, all of the largest rank, filled with zeros, and all of one scale, the rest folded into B."""
    r = max(update.rank for update in updates.values())
    found = {}
    for module, update in updates.items():
        missing = r - update.rank
        down = torch.cat([update.A, update.A.new_zeros(missing, update.A.shape[1])])
        up = torch.cat([update.B, update.B.new_zeros(len(update.B), missing)], 1)
        found[module] = LowRank(down, with_scale(LowRank(down, up, update.scale), scale), scale)
    return found


def with_scale(update: LowRank, scale: float) -> torch.Tensor:
    """The B with which the update has another scale; the same bits where that is its own."""
    return update.B if update.scale == scale else update.B * (update.scale / scale)


def commonest_scale(updates: Mapping[str, LowRank]) -> float:
    """The scale that most modules have, so that few factors change; one of zero is folded into B, which divides by the others."""
    return commonest([update.scale for update in updates.values()])


def commonest(values: Sequence[float]) -> float:
    """Of those that are not zero; 1 if all are."""
    found = [value for value in values if value] or [1.0]
    return max(found, key=found.count)


def largest_rank(config: LoraConfig) -> int:
    """Of any module."""
    return max(config.r, *config.rank_pattern.values(), 1)


def prove(expected: Mapping[str, LowRank], found: Mapping[str, LowRank], what: str) -> float:
    """The largest relative difference between the updates of an adapter and those that were read back, scales included.

    Raises:
        ProofError: it is more than rounding, or modules are missing.
    """
    if expected.keys() != found.keys():
        raise ProofError(
            f"{what} holds other modules than the adapter: {', '.join(sorted(expected.keys() ^ found.keys()))}"
        )
    worst = _largest([0.0, *(_difference(update, found[module]) for module, update in expected.items())])
    if not worst <= PROVED:
        raise ProofError(f"{what}, read back, differs from the adapter by {worst:.3g} of its size; do not use it")
    return worst


def _difference(expected: LowRank, found: LowRank) -> float:
    """Of A, and of B times the scale, after zeros that only fill up the rank."""
    r = expected.rank
    pairs = [
        (expected.A, found.A[:r]),
        (expected.B.double() * expected.scale, found.B[:, :r].double() * found.scale),
    ]
    if bool(found.A[r:].any()) or bool(found.B[:, r:].any()):
        return float("inf")
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    tiny = torch.finfo(torch.float32).tiny
    return _largest([float((a - b).abs().max() / a.abs().max().clamp_min(tiny)) for a, b in pairs])


def _largest(values: Sequence[float]) -> float:
    """NaN if one of them is, which Python's own maximum passes over."""
    return float(torch.tensor(values, dtype=torch.float64).max())
