"""Summed loss of a packed batch: by the fast path where the model is described, by its own forward where not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from twofold.base.batch import PackedBatch, idle_batch, pad
from twofold.base.blocks import Decoder, NotDescribed, describe, norm_of
from twofold.events import Emit, Progress, silent
from twofold.functional.loss import HeadLoss, head_loss, logits_loss
from twofold.functional.norm import rms_norm
from twofold.layers.protocol import AdapterLayer
from twofold.native.training import native_kernels
from twofold.training.block import Trunk, asked_states
from twofold.training.layout import lay_out
from twofold.training.tasks import task_objective
from twofold.world import ALONE, World


@runtime_checkable
class Objective(Protocol):
    """From a batch on the CPU to the sum of its supervised tokens' losses."""

    @property
    def path(self) -> str:
        """Which path this is, and why: for the log."""
        ...

    def __call__(self, batch: PackedBatch) -> HeadLoss: ...


@dataclass(frozen=True)
class FastObjective:
    """Packed rows, shared prefixes once, through fused blocks; logits in chunks, at supervised rows only."""

    decoder: Decoder
    recompute: bool
    share_prefixes: bool = True
    trunk: Trunk | None = None
    path: str = "fast path: packed rows through fused blocks"

    def __call__(self, batch: PackedBatch) -> HeadLoss:
        if not batch.supervised_tokens:
            return HeadLoss(torch.zeros((), requires_grad=True), torch.zeros((), dtype=torch.int64))
        layout = lay_out(batch, share=self.share_prefixes)
        hidden = asked_states(self.decoder, layout, recompute=self.recompute, trunk=self.trunk)
        labels = layout.labels.to(hidden.device)
        rows = hidden.index_select(0, layout.predicting.to(hidden.device))
        head = self.decoder.head
        if isinstance(head, AdapterLayer):
            return logits_loss(self.decoder.logits(rows), labels)
        normed = rms_norm(rows, norm_of(self.decoder.norm))
        return head_loss(normed, cast(Tensor, head.weight), labels, self.decoder.logit_softcap)


@dataclass(frozen=True)
class PlainObjective:
    """Padded examples through the model's own forward; the head is shown only the supervised rows."""

    model: Any
    pad_id: int
    path: str

    def __call__(self, batch: PackedBatch) -> HeadLoss:
        padded = pad(batch.to(self.model.device), self.pad_id)
        inputs = {"input_ids": padded.token_ids, "attention_mask": padded.attention_mask}
        with head_shown(self.model, padded.rows):
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits_loss(logits[0], padded.labels)


@contextmanager
def head_shown(model: Any, rows: Tensor) -> Iterator[None]:
    """Within, the output head sees these rows (example * length + position) alone, as if of one example: (1, rows, d)."""

    def chosen(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = arguments
        return hidden.flatten(0, 1)[rows][None], *rest

    handle = model.get_output_embeddings().register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        handle.remove()


def objective_for(
    model: Any, pad_id: int, *, recompute: bool, share_prefixes: bool = True, cache_frozen: bool = False
) -> Objective:
    """The fastest objective that is right for this model and its task."""
    if (found := task_objective(model, pad_id)) is not None:
        if recompute:
            model.activation_checkpointing_enable()
        return found
    described = describe(model)
    if isinstance(described, Decoder):
        fast = FastObjective(described, recompute, share_prefixes)
        return _remembering(fast) if cache_frozen else fast
    return plain_objective(model, pad_id, described, recompute=recompute)


def _remembering(objective: FastObjective) -> FastObjective:
    """The same with the states below the lowest layer that learns kept, if there are any."""
    trunk = Trunk(objective.decoder)
    if trunk.depth:
        return replace(objective, trunk=trunk)
    return replace(
        objective,
        path=f"{objective.path}; cache_frozen has nothing to keep, for the embedding or the first layer learns",
    )


def plain_objective(model: Any, pad_id: int, why: NotDescribed, *, recompute: bool) -> PlainObjective:
    """The model's own forward, with its own gradient checkpointing where asked for."""
    if recompute:
        model.activation_checkpointing_enable()
    return PlainObjective(model, pad_id, f"plain path: {why.reason}")


@dataclass(frozen=True)
class HeldOut:
    """Means over all supervised tokens of held-out data."""

    loss: float
    token_accuracy: float
    tokens: int


@torch.no_grad()
def evaluate_loss(
    objective: Objective,
    batches: list[PackedBatch],
    emit: Emit = silent,
    task: str = "evaluating",
    world: World = ALONE,
) -> HeldOut:
    """Run held-out batches through an objective, dealt out among the processes; the figures are those of all."""
    loss, correct, count = 0.0, 0.0, 0.0
    own = batches[world.rank :: world.size]
    with native_kernels():
        for done, batch in enumerate(own, start=1):
            found = objective(batch)
            loss, correct = loss + float(found.loss_sum), correct + int(found.correct)
            count += batch.supervised_tokens
            emit(Progress(task=task, done=done, total=len(own)))
        for _ in range(-(-len(batches) // world.size) - len(own)):
            objective(idle_batch())
    loss, correct, count = world.sum(loss, correct, count)
    return HeldOut(loss / count, correct / count, int(count))
