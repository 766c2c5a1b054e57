"""What an adapter's updates are made of while it trains: the singular values of each, from its factors."""

from __future__ import annotations

import torch
from torch import nn

from twofold.adapter.attach import adapter_layers
from twofold.layers.linear import LinearShare
from twofold.lowrank.spectra import singular_values

DIGITS = 5


@torch.no_grad()
def spectra(model: nn.Module) -> dict[str, list[float]]:
    """By module, the singular values of what each linear map's update is now, largest first, to five digits; none of factors that
    are no longer finite."""
    updates = {
        name: share.low_rank()
        for name, layer in adapter_layers(model)
        for share in layer.active()
        if isinstance(share, LinearShare)
    }
    return {
        name: [float(f"{value:.{DIGITS}g}") for value in singular_values(update).tolist()]
        for name, update in updates.items()
        if update.A.isfinite().all() and update.B.isfinite().all()
    }
