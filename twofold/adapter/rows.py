"""Mixed batches: each row of a batch with adapters of its own, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from twofold.adapter.attach import adapters_of, check_known, check_weights, is_merged
from twofold.errors import ConfigError
from twofold.layers.rows import Rows


@contextmanager
def rows(model: nn.Module, names: Sequence[str | Mapping[str, float] | None]) -> Iterator[None]:
    """Run batches whose rows have adapters of their own, for the length of a `with` block.

    Args:
        names: one for each row of the batch: an adapter, several with a weight each, or None for the bare base.

    Raises:
        ConfigError: a name is not attached, the model is training or merged, or a row would need two whole copies of a module;
            from the model's forward, an adapted layer sees other rows than the batch's, or in the order of a mixture's router.
    """
    if model.training:
        raise ConfigError(
            "a mixed batch is for inference, where nothing is dropped and nothing learned; call model.eval()"
        )
    if is_merged(model):
        raise ConfigError("adapters are merged into this model, the same for all rows; call unmerge first")
    wanted = [{} if n is None else {n: 1.0} if isinstance(n, str) else dict(n) for n in names]
    for weights in {tuple(w.items()) for w in wanted}:
        check_known(model, dict(weights))
        check_weights(model, dict(weights))
    used = tuple(dict.fromkeys(name for weights in wanted for name in weights))
    table = torch.tensor([[weights.get(name, 0.0) for name in used] for weights in wanted]).view(len(wanted), len(used))
    found = adapters_of(model)
    before = [adapters.rows for adapters in found]
    try:
        for adapters in found:
            adapters.rows = Rows(used, table)
        yield
    finally:
        for adapters, outer in zip(found, before, strict=True):
            adapters.rows = outer
