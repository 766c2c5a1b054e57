"""What a study measures of a model besides its held-out loss: answers, its loss on other texts, the spectrum of what it learned."""

from __future__ import annotations

import json
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
from twofold.events import silent
from twofold.layers.protocol import bare_modules
from twofold.lowrank.spectra import energy_rank, singular_values, stable_rank
from twofold.recipes.evaluate import evaluate
from twofold.recipes.intents import ask
from twofold.recipes.materials import Ground
from twofold.recipes.proving import prove
from twofold.recipes.studies import Study

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Ranks at which the kept share of the energy is noted."""


def probe_untouched(study: Study, ground: Ground, base: Base) -> dict[str, Any]:
    """Of the base before any training."""
    return _of_any(study, ground, base)


def probe_adapter(study: Study, ground: Ground, base: Base, adapter: Path) -> dict[str, Any]:
    """Of an adapter over the base it was trained on."""
    with _attached(base.model, adapter):
        found = _of_any(study, ground, base)
    if "spectra" in study.probes:
        values = {name: singular_values(update) for name, update in updates_of(open_adapter(adapter)).items()}
        found["spectra"] = _summed_up(values)
    if "promises" in study.probes:
        found["promises"] = prove(base, ground.evaluation, adapter)
    return found


def probe_full(study: Study, ground: Ground, base: Base, model: Path) -> dict[str, Any]:
    """Of a model that was trained whole."""
    if not study.probes:
        return {}
    tuned = load_base(str(model), "float32", str(base.device))
    found = _of_any(study, ground, tuned)
    if "spectra" in study.probes:
        found["spectra"] = _summed_up(dict(_difference_values(base.model, tuned.model)))
    return found


def _of_any(study: Study, ground: Ground, base: Base) -> dict[str, Any]:
    """What is measured of a base, an adapter over it and a full model alike."""
    found: dict[str, Any] = {}
    if "other-texts" in study.probes:
        found["other-texts"] = _losses(ground, base)
    if "answers" in study.probes:
        found["answers"] = _answered(ground, base)
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


def _answered(ground: Ground, base: Base) -> dict[str, float]:
    """Shares of the held-out commands whose answers name the right intent, and are right as a whole."""
    rows = [json.loads(line)["messages"] for line in ground.evaluation.read_text(encoding="utf-8").splitlines()]
    found = ask("model", base, [row[:-1] for row in rows], [row[-1]["content"] for row in rows], silent)
    return {"intent right": found.intent_exact, "answer right": found.whole_exact}


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
