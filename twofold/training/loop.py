"""The training loop: steps, evaluations, checkpoints; nothing about data formats, folders or terminals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from twofold.base.batch import PackedBatch, idle_batch
from twofold.errors import NonFiniteLossError, StoppedError
from twofold.events import Checkpointed, Emit, Evaluated, Message, Spectrum, Step, Stopped, Warned
from twofold.functional.fusing import fused_kernels
from twofold.layers.linear import cast_once
from twofold.machine import memory_bytes
from twofold.native.training import native_kernels
from twofold.training import checkpoint
from twofold.training.checkpoint import Progressed, Trained
from twofold.training.objective import Objective
from twofold.training.optim import TrainingConfig, learning_rate, optimiser, set_rate
from twofold.training.parallel import draw_seed, start_alike, sum_gradients
from twofold.training.spectra import spectra
from twofold.training.stopping import stopping
from twofold.world import ALONE, World


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        parameters: what is trained, by name.
        constants: what the adapter holds beside that: see `checkpoint.Trained`.
        steps: optimiser steps in all.
        epoch: how many passes over the data so many steps make.
        batches: this process's packed micro-batches of a step, counted from 0.
        left_out: how many examples `batches` has left out so far, because nothing in them could be learned.
        evaluate: held-out loss and token accuracy over all processes, if there is held-out data.
        checkpoints: folder for checkpoints.
        world: the processes that share the work.
    """

    model: nn.Module
    objective: Objective
    parameters: Mapping[str, nn.Parameter]
    constants: Mapping[str, Tensor]
    config: TrainingConfig
    steps: int
    epoch: Callable[[int], float]
    batches: Callable[[int], list[PackedBatch]]
    left_out: Callable[[], int]
    evaluate: Callable[[], tuple[float, float]] | None
    checkpoints: Path
    device: torch.device
    world: World = ALONE

    @property
    def trained(self) -> Trained:
        return Trained(self.parameters, self.constants)


def train(job: Job, emit: Emit, resume_from: Path | None = None) -> Progressed:
    """Run a job to its end, or until early stopping; the model holds the last adapter, the result the best.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite; checkpoints up to then are kept.
        StoppedError: it was asked to stop; a checkpoint is kept.
    """
    with stopping.looked_for(), fused_kernels(job.device) if job.config.compile else native_kernels():
        return _train(job, emit, resume_from)


def _train(job: Job, emit: Emit, resume_from: Path | None) -> Progressed:
    start_alike(job.trained.tensors().values(), job.world)
    optimise = optimiser(job.model, job.config)
    progressed = _resumed(job, optimise, resume_from, emit) if resume_from else Progressed()
    job.model.train()
    while progressed.step < job.steps and not _should_stop(job, progressed):
        started = time.perf_counter()
        event = _step(job, optimise, progressed)
        progressed.seconds += time.perf_counter() - started
        emit(_with_time_left(event, job, progressed) if isinstance(event, Step) else event)
        last = progressed.step == job.steps
        if job.evaluate is not None and _due(job.config.evaluate_every, progressed.step, last):
            emit(_evaluate(job, job.evaluate, progressed))
        if _due(job.config.spectrum_every, progressed.step, last):
            emit(Spectrum(step=progressed.step, modules=spectra(job.model)))
        if _due(job.config.checkpoint_every, progressed.step, last) or (stopping.asked and not last):
            emit(_save(job, optimise, progressed))
        if stopping.asked and not last:
            emit(Stopped(step=progressed.step))
            raise StoppedError(f"stopped after step {progressed.step}; --resume goes on from there")
    job.model.eval()
    return progressed


def _resumed(job: Job, optimise: torch.optim.Optimizer, folder: Path, emit: Emit) -> Progressed:
    """Rank 0 reads, so that the folder need not be on every machine."""
    saved = job.world.on_main(lambda: checkpoint.read(folder, job.trained, job.world.size))
    checkpoint.restore(saved, job.trained, optimise)
    if saved.processes != job.world.size:
        emit(
            Message(
                text=f"{saved.processes} processes wrote {folder.name} and {job.world.size} go on from it: sums are taken "
                "in another order, so losses agree with an undisturbed run to rounding, and dropout draws other masks"
            )
        )
    return saved.progressed


def _save(job: Job, optimise: torch.optim.Optimizer, progressed: Progressed) -> Checkpointed:
    """Rank 0 writes; all processes hold the same."""

    def write() -> str:
        folder = checkpoint.save(job.checkpoints, progressed, job.trained, optimise, job.world.size)
        checkpoint.prune(job.checkpoints, job.config.keep_checkpoints)
        return folder.name

    return Checkpointed(step=progressed.step, path=job.world.on_main(write))


def _due(every: int | None, step: int, last: bool) -> bool:
    return every is not None and (last or step % every == 0)


def _should_stop(job: Job, progressed: Progressed) -> bool:
    return job.config.early_stopping is not None and progressed.stale >= job.config.early_stopping


def _step(job: Job, optimise: torch.optim.Optimizer, progressed: Progressed) -> Step | Warned:
    """One optimiser step. The loss is weighted by supervised tokens over all micro-batches of all processes."""
    started = time.perf_counter()
    rate = learning_rate(job.config, progressed.step, job.steps)
    set_rate(optimise, rate)
    batches, (tokens, supervised, left_out) = _drawn(job, progressed.step)
    progressed.left_out += left_out
    if not supervised:
        progressed.step += 1
        return Warned(text=f"step {progressed.step} had nothing supervised in its rows, so nothing was learnt in it")
    torch.manual_seed(draw_seed(job.config.seed, progressed.step, job.world.rank))
    loss, norm = _gradients(job, batches, supervised)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise NonFiniteLossError(_not_finite(job, progressed.step, loss, norm))
    optimise.step()
    optimise.zero_grad(set_to_none=True)
    progressed.step += 1
    progressed.tokens += tokens
    progressed.supervised_tokens += supervised
    seconds = time.perf_counter() - started
    return Step(
        step=progressed.step,
        steps=job.steps,
        epoch=job.epoch(progressed.step),
        loss=loss,
        learning_rate=rate,
        gradient_norm=norm,
        tokens=progressed.tokens,
        supervised_tokens=progressed.supervised_tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        memory_bytes=memory_bytes(job.device),
        seconds_left=0.0,
    )


def _drawn(job: Job, step: int) -> tuple[list[PackedBatch], list[int]]:
    """This process's batches of a step; of all processes' tokens, supervised tokens and examples left out."""
    before = job.left_out()
    batches = job.batches(step)
    tokens, supervised = sum(b.tokens for b in batches), sum(b.supervised_tokens for b in batches)
    return batches, list(map(int, job.world.sum(tokens, supervised, job.left_out() - before)))


def _gradients(job: Job, batches: list[PackedBatch], supervised: int) -> tuple[float, float]:
    """Leave the step's clipped gradient in the parameters; its mean loss, and the gradient's norm before clipping."""
    idle = job.world.largest(len(batches)) - len(batches)  # asked first: passes over a sharded base are collective too
    with cast_once(job.model):
        loss = sum(_backward(job, batch, supervised) for batch in batches)
        for _ in range(idle):
            _backward(job, idle_batch(), math.inf)
    sum_gradients(job.parameters.values(), job.world)
    return job.world.sum(loss)[0], _clip(job)


def _with_time_left(event: Step, job: Job, progressed: Progressed) -> Step:
    from dataclasses import replace

    return replace(event, seconds_left=progressed.seconds / progressed.step * (job.steps - progressed.step))


def _backward(job: Job, batch: PackedBatch, supervised: float | int) -> float:
    """Add a micro-batch's share of the step's gradient; its share of the mean loss over `supervised` tokens."""
    loss = job.objective(batch).loss_sum / supervised
    loss.backward()
    return float(loss.detach())


def _clip(job: Job) -> float:
    limit = job.config.gradient_clip or math.inf
    return float(torch.nn.utils.clip_grad_norm_(job.parameters.values(), limit))


def _not_finite(job: Job, step: int, loss: float, norm: float) -> str:
    kept = job.world.on_main(lambda: checkpoint.newest(job.checkpoints))
    there = f"the last good checkpoint is {kept}" if kept else "no checkpoint was due before (checkpoint_every)"
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
    return f"step {step + 1} gave {what}, so training stopped before it could spoil the adapter; {there}; try a lower learning rate"


def _evaluate(job: Job, evaluate: Callable[[], tuple[float, float]], progressed: Progressed) -> Evaluated:
    job.model.eval()
    loss, accuracy = evaluate()
    job.model.train()
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the held-out loss after step {progressed.step} is {loss}; try a lower learning rate")
    best = progressed.best_loss is None or loss < progressed.best_loss
    progressed.stale = 0 if best else progressed.stale + 1
    if best:
        progressed.best_loss, progressed.best_step = loss, progressed.step
        progressed.best = snapshot(job.parameters)
    return Evaluated(step=progressed.step, loss=loss, token_accuracy=accuracy, best=best)


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the trained tensors."""
    return {name: p.detach().clone() for name, p in parameters.items()}


@torch.no_grad()
def restore(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Put a snapshot back."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
