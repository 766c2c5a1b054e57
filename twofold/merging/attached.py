"""Adapters of a live model combined into one more: their true updates, by a method of `lowrank.algebra`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from twofold.adapter.attach import adapter_layers, attach, attached, shares
from twofold.adapter.config import LoraConfig
from twofold.adapter.peft_config import exceptions, names_in_full
from twofold.adapter.shapes import module_shapes
from twofold.errors import ConfigError
from twofold.layers.embedding import EmbeddingShare
from twofold.layers.linear import LinearShare
from twofold.layers.protocol import Share
from twofold.lowrank.factors import LowRank
from twofold.merging.methods import Combination, Weighted, problems_of, reduced_by


@torch.no_grad()
def add_combined(
    model: nn.Module, weights: Sequence[tuple[str, float]], name: str, how: Combination
) -> dict[str, float]:
    """Attach `name`, an adapter whose update in every module is what the method makes of those of the adapters named.

    Returns:
        By module, the share of the energy that was lost on the way to the rank.

    Raises:
        ConfigError: an adapter is not attached or is more than factors, the method is not known, or `linear` would not be exact.
    """
    _check(model, weights, name, how)
    found = _updates(model, weights)
    r = how.r or max(u.rank for updates in found.values() for u, _ in updates)
    reduced = {module: reduced_by(how, module, updates, r) for module, updates in found.items()}
    _attach(model, {module: one.update for module, one in reduced.items()}, name)
    return {module: one.lost for module, one in reduced.items()}


def _check(model: nn.Module, weights: Sequence[tuple[str, float]], name: str, how: Combination) -> None:
    problems = problems_of(how)
    if not weights:
        problems.append("no adapters are given, so there is nothing to combine")
    if name in attached(model):
        problems.append(f"an adapter named '{name}' is attached already; delete it or choose another name")
    if problems:
        raise ConfigError("; ".join(problems))


def _updates(model: nn.Module, weights: Sequence[tuple[str, float]]) -> dict[str, Weighted]:
    """By module, the updates of those adapters that change it."""
    layers = dict(adapter_layers(model))
    found: dict[str, Weighted] = {}
    for adapter, weight in weights:
        for module, share in shares(model, adapter).items():
            found.setdefault(module, []).append((_update(adapter, module, share, layers[module].base), weight))
    return found


def _update(adapter: str, module: str, share: Share, base: nn.Module) -> LowRank:
    """A share's whole update, active or not, as a matrix.

    Raises:
        ConfigError: it is more than two factors, or none.
    """
    named = share.plain(base)
    if not isinstance(share, LinearShare | EmbeddingShare) or len(named) != 2:
        raise ConfigError(
            f"adapter '{adapter}' is more than the two factors of one map in '{module}' ({', '.join(named)}), and such tensors do "
            "not add up with the update; combine adapters of plain LoRA, or merge them into the base one after the other"
        )
    if getattr(base, "groups", 1) > 1:
        raise ConfigError(
            f"'{module}' is a convolution with groups, whose update is no one product of two factors; leave it out"
        )
    A, B = named.values()
    return LowRank(A.flatten(1), B.flatten(1), share.scale)


def _attach(model: nn.Module, updates: Mapping[str, LowRank], name: str) -> None:
    """A new adapter with these updates."""
    ranks = {module: update.rank for module, update in updates.items()}
    r = max(ranks.values())
    patterns = exceptions(ranks, r)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=names_in_full(ranks, module_shapes(model)),
    )
    with torch.random.fork_rng():
        attach(model, config, name)
    layers = dict(adapter_layers(model))
    for module, share in shares(model, name).items():
        update, base = updates[module], layers[module].base
        values = (update.A.clone(), update.B * update.scale)
        share.load(base, {k: v.reshape(t.shape) for (k, t), v in zip(share.saved(base).items(), values, strict=True)})
