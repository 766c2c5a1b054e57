"""The weighted sum of attached adapters as one more: their factors end to end, which is exact for any weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from twofold.adapter.attach import adapter_layers, attach, shares
from twofold.adapter.config import LoraConfig
from twofold.adapter.peft_config import exceptions, names_in_full
from twofold.adapter.target import module_shapes
from twofold.errors import ConfigError
from twofold.layers.embedding import EmbeddingShare
from twofold.layers.linear import LinearShare


@torch.no_grad()
def concatenate(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Attach `name`, whose update is Σ weight · update of the adapters named; its rank in a module is the sum of theirs.

    Raises:
        ConfigError: an adapter is not attached, or changes a module by more than the factors of a linear map or an embedding.
    """
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for adapter, weight in weights.items():
        for module, share in shares(model, adapter).items():
            named = share.saved(_base(model, module))
            if not isinstance(share, LinearShare | EmbeddingShare) or len(named) != 2:
                raise ConfigError(
                    f"adapter '{adapter}' has more than factors on '{module}' ({', '.join(named)}); only those add up"
                )
            factors.setdefault(module, []).append((share.A, share.B * (share.scale * weight)))
    shapes = module_shapes(model)
    ranks = {module: sum(len(A) for A, _ in found) for module, found in factors.items()}
    r = max(ranks.values())
    patterns = exceptions(ranks, r)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=names_in_full(ranks, shapes),
    )
    attach(model, config, name)
    for module, share in shares(model, name).items():
        A, B = (torch.cat([f[i] for f in factors[module]], i) for i in (0, 1))
        keys = share.saved(_base(model, module))
        share.load(_base(model, module), dict(zip(keys, (A, B), strict=True)))


def _base(model: nn.Module, module: str) -> nn.Module:
    return dict(adapter_layers(model))[module].base
