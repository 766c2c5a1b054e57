"""What a study measures of a model besides its held-out loss: its loss on other texts, and the spectrum of what it learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twofold.adapter.attach import activate, detach
from twofold.adapter.files import load_adapter, open_adapter
from twofold.adapter.updates import updates_of
from twofold.base.load import Base, load_base
from twofold.data.examples import DataConfig
from twofold.layers.protocol import bare_modules
from twofold.lowrank.spectra import energy_rank, singular_values, stable_rank
from twofold.recipes.evaluate import evaluate
from twofold.recipes.materials import Ground
from twofold.recipes.proving import prove
from twofold.recipes.studies import Study

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Ranks at which the kept share of the energy is noted."""


def probe_untouched(study: Study, ground: Ground, base: Base) -> dict[str, Any]:
    """Of the base before any training."""
    return {"other-texts": _losses(ground, base)} if "other-texts" in study.probes else {}


def probe_adapter(study: Study, ground: Ground, base: Base, adapter: Path) -> dict[str, Any]:
    """Of an adapter over the base it was trained on."""
    found: dict[str, Any] = {}
    if "other-texts" in study.probes:
        with _attached(base.model, adapter):
            found["other-texts"] = _losses(ground, base)
    if "spectra" in study.probes:
        values = {name: singular_values(update) for name, update in updates_of(open_adapter(adapter)).items()}
        found["spectra"] = _summed_up(values)
    if "promises" in study.probes:
        found["promises"] = prove(base, ground.evaluation, adapter)
    return found


def probe_full(study: Study, ground: Ground, base: Base, model: Path) -> dict[str, Any]:
    """Of a model that was trained whole."""
    found: dict[str, Any] = {}
    if not study.probes:
        return found
    tuned = load_base(str(model), "float32", str(base.device))
    if "other-texts" in study.probes:
        found["other-texts"] = _losses(ground, tuned)
    if "spectra" in study.probes:
        found["spectra"] = _summed_up(dict(_difference_values(base.model, tuned.model)))
    return found


@contextmanager
def _attached(model: Any, adapter: Path) -> Iterator[None]:
    load_adapter(model, adapter, "probed")
    try:
        activate(model, "probed")
        model.eval()
        yield
    finally:
        detach(model, "probed")


def _losses(ground: Ground, base: Base) -> dict[str, float]:
    """On each other kind of text."""
    return {name: evaluate(base, DataConfig(train=str(path)))["loss"] for name, path in ground.others.items()}


@torch.no_grad()
def _difference_values(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The singular values of W' - W for every linear layer but the head."""
    tuned = dict(bare_modules(after))
    for name, module in bare_modules(before):
        if isinstance(module, nn.Linear) and name != "lm_head":
            other = tuned[name]
            if isinstance(other, nn.Linear):
                yield name, torch.linalg.svdvals(other.weight.float() - module.weight.float()).double()


def _summed_up(values: dict[str, Tensor]) -> dict[str, Any]:
    """Means over the modules: the share of energy by rank, the rank that keeps 90 % and 99 %, the stable rank."""
    kept = {r: [float(v[:r].square().sum() / v.square().sum()) for v in values.values()] for r in RANKS}
    widest = max(len(v) for v in values.values())
    return {
        "modules": len(values),
        "energy": {str(r): sum(shares) / len(shares) for r, shares in kept.items() if r <= widest},
        "rank_90": sum(energy_rank(v, 0.9) for v in values.values()) / len(values),
        "rank_99": sum(energy_rank(v, 0.99) for v in values.values()) / len(values),
        "stable_rank": sum(stable_rank(v) for v in values.values()) / len(values),
    }
