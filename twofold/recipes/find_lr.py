"""`twofold train --find-lr`: short runs at several learning rates from one start, and the rate that they speak for."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.base.load import Base
from twofold.data.examples import Examples
from twofold.errors import DataError, NonFiniteLossError
from twofold.events import Emit, Event, Message, Progress, Step, silent
from twofold.recipes.rate_page import write_page
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import held_out_loss, prepare
from twofold.training.loop import Job, restore, snapshot
from twofold.training.loop import train as run_job
from twofold.training.objective import evaluate_loss
from twofold.training.rate import Choice, RateSearch, Trial, choose, closing_steps

TASK = "trying learning rates, steps"


@dataclass(frozen=True)
class _Bench:
    """What every trial begins from."""

    base: Base
    held_out: Examples | None
    job: Job
    start: dict[str, Tensor]


def find_lr(config: TrainConfig, search: RateSearch, emit: Emit = silent) -> dict[str, Any]:
    """Try each rate for a few steps, every time from the same factors over the same batches, and suggest one.

    No run is made: one page of figures is written, beside the output folder of the configuration.

    Raises:
        UserError: as `train`.
    """
    started = time.perf_counter()
    base, held_out, job = prepare(_short(config, search), emit)
    bench = _Bench(base, _first(held_out, search.held_out), job, snapshot(job.parameters))
    untouched = _untouched_loss(job)
    trials = [_trial(bench, rate, i, search, emit) for i, rate in enumerate(search.grid())]
    _restart(bench)
    choice = choose(trials, untouched, search)
    page = page_beside(Path(config.output))
    found = _as_json(config, trials, untouched, choice, page, time.perf_counter() - started)
    write_page(page, found)
    return found


def page_beside(output: Path) -> Path:
    """Where the figures of the search for a run are written."""
    return output.with_name(f"{output.name}-find-lr.html")


def _short(config: TrainConfig, search: RateSearch) -> TrainConfig:
    """The run's settings but for its length and schedule; small data is gone through again."""
    training = replace(
        config.training,
        max_steps=search.steps,
        epochs=search.steps,
        schedule="constant",
        warmup=search.warmup,
        evaluate_every=None,
        early_stopping=None,
        checkpoint_every=None,
    )
    return replace(config, training=training)


def _first(examples: Examples | None, count: int) -> Examples | None:
    return replace(examples, items=examples.items[:count]) if examples and count else None


def _untouched_loss(job: Job) -> float:
    """The loss that a rate of zero would end with: the mean of the closing steps' batches before any training, steps with nothing
    supervised aside, as in a trial.

    Raises:
        DataError: there are no others.
    """
    steps = [step for step in range(job.steps) if any(b.supervised_tokens for b in job.batches(step))]
    if not steps:
        raise DataError(
            f"nothing is supervised in the {job.steps} steps of a trial, so no rate could learn; see twofold preview, and take "
            "more steps (find_lr.steps) or rows that fit data.max_length"
        )
    closing = steps[-closing_steps(len(steps)) :]
    return statistics.fmean(evaluate_loss(job.objective, job.batches(step)).loss for step in closing)


def _restart(bench: _Bench) -> None:
    """The first factors again, without what an interrupted step left behind."""
    restore(bench.job.parameters, bench.start)
    for parameter in bench.job.parameters.values():
        parameter.grad = None


def _trial(bench: _Bench, rate: float, place: int, search: RateSearch, emit: Emit) -> Trial:
    """One short run; a loss that is not finite ends it, and it alone."""
    losses: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, Step):
            losses.append(event.loss)
            done = place * search.steps + event.step
            emit(Progress(task=TASK, done=done, total=search.rates * search.steps))

    _restart(bench)
    job = replace(bench.job, config=replace(bench.job.config, learning_rate=rate))
    try:
        with torch.random.fork_rng():  # so that every trial draws the same dropout
            run_job(job, hear)
        held_out = held_out_loss(bench.base, bench.held_out).loss if bench.held_out else None
        trial = Trial(rate, tuple(losses), math.isfinite(held_out or 0.0), held_out)
    except NonFiniteLossError:
        job.model.eval()
        trial = Trial(rate, tuple(losses), False)
    emit(Message(text=_said(trial)))
    return trial


def _said(trial: Trial) -> str:
    if not trial.finite:
        return f"rate {trial.rate:g}: not finite after {len(trial.losses)} steps"
    held_out = "" if trial.held_out is None else f", held-out {trial.held_out:.4f}"
    return f"rate {trial.rate:g}: loss {trial.loss:.4f}{held_out}"


def _as_json(
    config: TrainConfig, trials: list[Trial], untouched: float, choice: Choice, page: Path, seconds: float
) -> dict[str, Any]:
    return {
        "suggested_learning_rate": choice.rate,
        "reason": choice.reason,
        "untouched_loss": untouched,
        "trials": [
            {
                "learning_rate": t.rate,
                "loss": t.loss if t.finite else None,
                "held_out_loss": t.held_out if t.finite else None,
                "diverged": t.rate in choice.diverged,
                "losses": list(t.losses),
            }
            for t in trials
        ],
        "base": config.base,
        "r": config.adapter.r,
        "page": str(page),
        "seconds": seconds,
    }
