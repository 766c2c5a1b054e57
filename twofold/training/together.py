"""Several adapters trained side by side over one base, step by step.

Each has its own data order, optimiser, schedule and clipping, and ends where it would have ended alone. Where all of them run on
the fast path without dropout, passes are joined: one pass of the base for the rows of several (`joined.py`), up to so many rows
as pay. Else each adapter is active alone in its own pass, and its bits are those of a training of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from twofold.adapter.attach import activate, adapters_of, shares
from twofold.base.batch import PackedBatch
from twofold.events import Emit, Progress
from twofold.functional.loss import HeadLoss
from twofold.layers.linear import LinearShare, cast_once
from twofold.layers.protocol import AdapterLayer, Adapters
from twofold.native.training import native_kernels
from twofold.training import checkpoint
from twofold.training.checkpoint import Progressed
from twofold.training.joined import joined_losses, only, rows_of
from twofold.training.loop import Job
from twofold.training.objective import FastObjective
from twofold.training.optim import learning_rate, set_rate
from twofold.training.parallel import draw_seed
from twofold.training.rate import closing_steps

TASK = "training side by side, steps"


@dataclass
class Learner:
    """One adapter at its training."""

    name: str
    job: Job
    optimise: torch.optim.Optimizer
    progressed: Progressed = field(default_factory=Progressed)

    def batches(self) -> list[PackedBatch]:
        return [b for b in self.job.batches(self.progressed.step) if b.supervised_tokens]

    def goes_on(self, until: int) -> bool:
        """Whether it has steps to take: one whose loss or gradient was not finite is left alone."""
        return self.progressed.failed is None and self.progressed.step < until

    def save(self) -> None:
        """A checkpoint, from which `resume` goes on."""
        checkpoint.save(self.job.checkpoints, self.progressed, self.job.trained, self.optimise)
        checkpoint.prune(self.job.checkpoints, 1)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        newest = checkpoint.newest(self.job.checkpoints)
        if newest is not None:
            saved = checkpoint.read(newest, self.job.trained)
            checkpoint.restore(saved, self.job.trained, self.optimise)
            self.progressed = saved.progressed


def joinable(model: Any, learners: Sequence[Learner]) -> bool:
    """Whether these adapters can learn on the rows of one pass."""
    objectives = [one.job.objective for one in learners]
    fast = all(isinstance(o, FastObjective) and o.trunk is None for o in objectives)
    return fast and all(_plain(model, one.name) for one in learners)


def _plain(model: Any, name: str) -> bool:
    """Whether an adapter is A and B on linear layers but the head, and nothing else."""
    found = shares(model, name).values()
    extra = ("bias_change", "b_bias", "magnitude")
    linear = all(isinstance(s, LinearShare) and all(getattr(s, n) is None for n in extra) for s in found)
    head = model.get_output_embeddings()
    on_head = isinstance(head, AdapterLayer) and name in head.by_name()
    return linear and not on_head and not any(getattr(s, "dropout", 0) for s in found)


def advance(model: Any, learners: Sequence[Learner], until: Mapping[str, int], rows_at_once: int, emit: Emit) -> None:
    """Train each learner up to its step `until`; all that are behind theirs take a step in turn.

    Args:
        rows_at_once: passes are joined while they have no more rows than this; 0 for never.
    """
    together = rows_at_once > 0 and joinable(model, learners)
    model.train()
    with native_kernels():
        while behind := [one for one in learners if one.goes_on(until[one.name])]:
            _step(model, behind, rows_at_once if together else 0)
            done, total = (sum(count.values()) for count in (_steps_of(learners), until))
            emit(Progress(task=TASK, done=done, total=total))
    model.eval()


def _steps_of(learners: Sequence[Learner]) -> dict[str, int]:
    return {one.name: one.progressed.step for one in learners}


def _step(model: Any, learners: Sequence[Learner], rows_at_once: int) -> None:
    batches = {one.name: one.batches() for one in learners}
    if rows_at_once:
        losses = _joined_gradients(model, learners, batches, rows_at_once)
    else:
        losses = {one.name: _own_gradient(model, one, batches[one.name]) for one in learners}
    for one in learners:
        _update(one, losses[one.name], batches[one.name])


def _own_gradient(model: Any, one: Learner, batches: list[PackedBatch]) -> float:
    """As in a training of its own, with the draws of dropout that it would have."""
    activate(model, one.name)
    torch.manual_seed(draw_seed(one.job.config.seed, one.progressed.step, one.job.world.rank))
    supervised = sum(b.supervised_tokens for b in batches)
    with cast_once(model):
        return sum(_backward([one.job.objective(b)], [supervised])[0] for b in batches)


def _joined_gradients(
    model: Any, learners: Sequence[Learner], batches: Mapping[str, list[PackedBatch]], rows_at_once: int
) -> dict[str, float]:
    activate(model, {one.name: 1.0 for one in learners})
    (adapters,) = adapters_of(model)
    objective = learners[0].job.objective
    if not isinstance(objective, FastObjective):
        raise TypeError("joined passes need the fast path")
    supervised = {name: sum(b.supervised_tokens for b in found) for name, found in batches.items()}
    losses = dict.fromkeys(batches, 0.0)
    with cast_once(model):
        for some in _passes(batches, rows_at_once, share=objective.share_prefixes):
            found = _losses(objective, adapters, some)
            values = _backward(found, [supervised[name] for name in some])
            losses |= {name: losses[name] + value for name, value in zip(some, values, strict=True)}
    return losses


def _losses(objective: FastObjective, adapters: Adapters, batches: Mapping[str, PackedBatch]) -> list[HeadLoss]:
    """Of one pass; a lone adapter's is that of its own training."""
    if len(batches) > 1:
        shared = objective.share_prefixes
        return joined_losses(objective.decoder, adapters, batches, recompute=objective.recompute, share=shared)
    with only(adapters, dict.fromkeys(batches, 1.0)):
        return [objective(batch) for batch in batches.values()]


def _passes(
    batches: Mapping[str, list[PackedBatch]], rows_at_once: int, *, share: bool
) -> Iterator[dict[str, PackedBatch]]:
    """The first micro-batches of all adapters, then the second, ..., joined while they have few enough rows."""
    for each in zip_longest(*batches.values()):
        some: dict[str, PackedBatch] = {}
        rows = 0
        for name, batch in zip(batches, each, strict=True):
            if batch is None:
                continue
            own = rows_of(batch, share=share)
            if some and rows + own > rows_at_once:
                yield some
                some, rows = {}, 0
            some[name] = batch
            rows += own
        if some:
            yield some


def _backward(found: Sequence[HeadLoss], supervised: Sequence[int]) -> list[float]:
    """Each loss as its share of its adapter's mean, after the gradients of all are added."""
    losses = [one.loss_sum / count for one, count in zip(found, supervised, strict=True)]
    torch.stack(losses).sum().backward() if len(losses) > 1 else losses[0].backward()
    return [float(loss.detach()) for loss in losses]


def _update(one: Learner, loss: float, batches: Sequence[PackedBatch]) -> None:
    """The optimiser's step, as the loop makes it; a learner that is no longer finite is left as it was."""
    job, progressed = one.job, one.progressed
    set_rate(one.optimise, learning_rate(job.config, progressed.step, job.steps))
    if batches:
        limit = job.config.gradient_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(job.parameters.values(), limit))
        if not math.isfinite(loss) or not math.isfinite(norm):
            progressed.failed = progressed.step + 1
        else:
            one.optimise.step()
        progressed.closing = [*progressed.closing, loss][-closing_steps(job.steps) :]
    one.optimise.zero_grad(set_to_none=True)
    progressed.step += 1
    progressed.tokens += sum(b.tokens for b in batches)
    progressed.supervised_tokens += sum(b.supervised_tokens for b in batches)
