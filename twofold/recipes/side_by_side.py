"""Trainings of a grid over one loaded base: attached together, trained side by side, halved, measured, saved, taken off again."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from twofold import atomic
from twofold.adapter.attach import activate, attach, detach
from twofold.adapter.files import save_adapter
from twofold.base.head import draw_again
from twofold.errors import ConfigError
from twofold.events import Emit, Message
from twofold.lowrank.spectral_init import DATA_STARTS
from twofold.recipes.grid import Cell, scores
from twofold.recipes.loading import Loaded
from twofold.recipes.runs import RunFolder
from twofold.recipes.settings import TrainConfig
from twofold.recipes.tasks import TASKS
from twofold.recipes.train import held_out_loss, job_of, provenance_of
from twofold.training.optim import optimiser
from twofold.training.together import Learner, advance
from twofold.world import ALONE

MARKS = (0.25, 0.5, 0.75, 1.0)
"""Shares of a training at which checkpoints are written."""


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """How the trainings of a grid share the machine.

    Attributes:
        halvings: how often the worse half of each rank's learning rates is given up, at a quarter and at half of the training; 0
            for never.
        rows_at_once: adapters share a pass of the base while it has no more rows than this; 0 trains each in passes of its own,
            which gives the very bits of `twofold train`.
    """

    halvings: int = 2
    rows_at_once: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.halvings < len(MARKS) or self.rows_at_once < 0:
            raise ConfigError(
                f"halvings is {self.halvings} and rows_at_once {self.rows_at_once}; the first may be 0 to {len(MARKS) - 1}, the "
                "second 0 or more"
            )

    def rungs(self) -> tuple[float, ...]:
        """The marks at which losses are compared."""
        return MARKS[: self.halvings]


def check_sweepable(config: TrainConfig) -> None:
    """Refuse what trainings side by side cannot do.

    Raises:
        ConfigError: names the settings.
    """
    used = {
        "data.evaluation (none)": config.data.evaluation is None,
        "data.streaming": config.data.streaming,
        "full": config.full,
        "adapter.init_from": config.adapter.init_from is not None,
        f"adapter.init_lora_weights: {config.adapter.init_lora_weights}": config.adapter.init_lora_weights
        in DATA_STARTS,
        "training.evaluate_every": config.training.evaluate_every is not None,
        "training.compile": config.training.compile,
        "training.parallel: shard": config.training.parallel == "shard",
    }
    if asked := [name for name, is_used in used.items() if is_used]:
        raise ConfigError(
            f"a grid over one loaded base cannot be run with {' and '.join(asked)}: it compares fresh adapters on held-out data by "
            "their last state; change that, or run twofold train for each"
        )


def run_group(
    config: TrainConfig, loaded: Loaded, group: Sequence[Cell], how: SideBySide, folder: Path, emit: Emit
) -> list[dict[str, Any]]:
    """Train some cells of a grid side by side; what each came to. A group that was interrupted goes on from its last mark.

    Args:
        folder: of the whole grid.

    Raises:
        ConfigError: as `check_sweepable`.
        RunError: the folder cannot be written.
    """
    base = loaded.base
    try:
        learners = [_learner(cell, i, config, loaded, folder) for i, cell in enumerate(group)]
        return _trained(config, loaded, list(zip(group, learners, strict=True)), how, folder, emit)
    finally:
        detach(base.model)
        draw_again(base.model, base.made, config.training.seed)


def forget_checkpoints(group: Sequence[Cell], folder: Path) -> None:
    """Remove what only a resumed group would need, once its results are written elsewhere."""
    for cell in group:
        shutil.rmtree(RunFolder(folder / "cells" / cell.label).checkpoints, ignore_errors=True)


def _learner(cell: Cell, place: int, config: TrainConfig, loaded: Loaded, folder: Path) -> Learner:
    """A fresh adapter with its optimiser, the same as `twofold train` begins with, the head that it copies included."""
    own = cell.of(config)
    check_sweepable(own)
    base, name = loaded.base, f"cell{place}"
    draw_again(base.model, base.made, own.training.seed)
    torch.manual_seed(own.training.seed)
    attach(base.model, TASKS[config.task].adapter(own.adapter.lora(), base), name)
    job = job_of(own, RunFolder(folder / "cells" / cell.label), loaded, ALONE)
    return Learner(name, job, optimiser(base.model, own.training))


Pairs = Sequence[tuple[Cell, Learner]]


def _trained(
    config: TrainConfig, loaded: Loaded, pairs: Pairs, how: SideBySide, folder: Path, emit: Emit
) -> list[dict[str, Any]]:
    model = loaded.base.model
    described = _described_again(config, loaded, [one for _, one in pairs])
    pairs = [(cell, one) for (cell, _), one in zip(pairs, described, strict=True)]
    kept, rungs = list(pairs), _recorded(pairs, folder)
    for _, one in pairs:
        one.resume()
    for mark in MARKS:
        done = {row["label"] for row in rungs if row["mark"] == mark}
        until = {one.name: round(mark * one.job.steps) for _, one in kept}
        advance(model, [one for _, one in kept], until, how.rows_at_once, emit)
        for cell, one in kept:
            if cell.label not in done:
                one.save()
        if mark in how.rungs():
            rungs += [_rung(cell, one, mark, loaded) for cell, one in kept if cell.label not in done]
            atomic.write_json(_progress(pairs, folder), rungs)
            kept = _better_half(kept, [row for row in rungs if row["mark"] == mark], emit)
    staying = {cell.label for cell, _ in kept}
    return [_result(cell, one, config, loaded, rungs, folder, stopped=cell.label not in staying) for cell, one in pairs]


def _described_again(config: TrainConfig, loaded: Loaded, learners: Sequence[Learner]) -> list[Learner]:
    """With objectives that know every adapter's modules: those attached later may have wrapped more of the model."""
    found = []
    for one in learners:
        activate(loaded.base.model, one.name)
        run = RunFolder(one.job.checkpoints.parent)
        objective = job_of(replace(config, training=one.job.config), run, loaded, ALONE).objective
        found.append(replace(one, job=replace(one.job, objective=objective)))
    return found


def _progress(pairs: Pairs, folder: Path) -> Path:
    return folder / "cells" / pairs[0][0].label / "rungs.json"


def _recorded(pairs: Pairs, folder: Path) -> list[dict[str, Any]]:
    path = _progress(pairs, folder)
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return found


def _rung(cell: Cell, one: Learner, mark: float, loaded: Loaded) -> dict[str, Any]:
    loss = None if one.progressed.failed else _held_out(one, loaded)["loss"]
    finite = loss is not None and math.isfinite(loss)
    return {
        "label": cell.label,
        "settings": dict(cell.settings),
        "seed": cell.seed,
        "mark": mark,
        "step": one.progressed.step,
        "loss": loss if finite else None,
        "finished": True,
    }


def _better_half(kept: Pairs, at_mark: Sequence[dict[str, Any]], emit: Emit) -> list[tuple[Cell, Learner]]:
    """Of the learning rates of each rank those that are not given up: half of them, rounded up, by the mean over the seeds."""
    order = [s.settings for s in scores(at_mark)]
    groups = {cell.group: {other.settings for other, _ in kept if other.group == cell.group} for cell, _ in kept}
    best = {group: [s for s in order if s in own][: math.ceil(len(own) / 2)] for group, own in groups.items()}
    staying = {s for some in best.values() for s in some}
    given_up = [dict(s) for s in order if s not in staying]
    if given_up:
        emit(Message(text=f"given up as hopeless: {'; '.join(_said(s) for s in given_up)}"))
    return [(cell, one) for cell, one in kept if cell.settings in staying]


def _said(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in settings.items())


def _held_out(one: Learner, loaded: Loaded) -> dict[str, Any]:
    """What an evaluation of this adapter alone says."""
    if loaded.evaluation is None:
        raise ConfigError("a grid is judged on held-out data; name some in data.evaluation")
    model = loaded.base.model
    activate(model, one.name)
    model.eval()
    found = held_out_loss(loaded.base, loaded.evaluation)
    return {"loss": found.loss, "accuracy": found.token_accuracy}


def _result(
    cell: Cell,
    one: Learner,
    config: TrainConfig,
    loaded: Loaded,
    rungs: Sequence[dict[str, Any]],
    folder: Path,
    *,
    stopped: bool,
) -> dict[str, Any]:
    """What a cell came to; the adapter of one that came to its end is saved."""
    own, failed = [r for r in rungs if r["label"] == cell.label], one.progressed.failed
    found: dict[str, Any] = {"loss": own[-1]["loss"] if own and failed is None else None, "accuracy": None}
    path = folder / "cells" / cell.label / "adapter"
    if not stopped and failed is None:
        found = _held_out(one, loaded)
        provenance = provenance_of(cell.of(config), loaded, one.progressed)
        save_adapter(loaded.base.model, path, one.name, provenance=provenance, base_name=loaded.base.public_name)
    closing = one.progressed.closing
    return {
        "label": cell.label,
        "settings": dict(cell.settings),
        "seed": cell.seed,
        **found,
        "train_loss": statistics.fmean(closing) if closing else None,
        "steps": one.progressed.step,
        "failed_at": failed,
        "finished": not stopped,
        "rungs": [{k: r[k] for k in ("mark", "step", "loss")} for r in own],
        "parameters": sum(p.numel() for p in one.job.parameters.values()),
        "adapter": str(path.relative_to(folder)) if path.is_dir() else None,
    }
