"""Summed loss of a packed batch: by the fast path where the model is described, by its own forward where not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from twofold.base.batch import PackedBatch, pad
from twofold.base.blocks import Decoder, NotDescribed, describe
from twofold.events import Emit, Progress, silent
from twofold.functional.loss import HeadLoss, head_loss, logits_loss
from twofold.layers.protocol import AdapterLayer
from twofold.training.block import hidden_states


@runtime_checkable
class Objective(Protocol):
    """From a batch on the model's device to the sum of its supervised tokens' losses."""

    @property
    def path(self) -> str:
        """Which path this is, and why: for the log."""
        ...

    def __call__(self, batch: PackedBatch) -> HeadLoss: ...


@dataclass(frozen=True)
class FastObjective:
    """Packed rows through the described blocks; logits in chunks, at supervised rows only."""

    decoder: Decoder
    recompute: bool
    path: str = "fast path: packed rows through fused blocks"

    def __call__(self, batch: PackedBatch) -> HeadLoss:
        hidden = hidden_states(self.decoder, batch, recompute=self.recompute)[batch.predicting]
        head = self.decoder.head
        if isinstance(head, AdapterLayer):
            return logits_loss(cast(Tensor, head(hidden)), batch.labels)
        return head_loss(hidden, cast(Tensor, head.weight), batch.labels)


@dataclass(frozen=True)
class PlainObjective:
    """Padded examples through the model's own forward; the head is shown only the supervised rows."""

    model: Any
    pad_id: int
    path: str

    def __call__(self, batch: PackedBatch) -> HeadLoss:
        padded = pad(batch, self.pad_id)
        inputs = {"input_ids": padded.token_ids, "attention_mask": padded.attention_mask}
        head = self.model.get_output_embeddings()

        def supervised_rows(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *rest = arguments
            return hidden.flatten(0, 1)[padded.rows][None], *rest

        handle = head.register_forward_pre_hook(supervised_rows)
        try:
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        finally:
            handle.remove()
        return logits_loss(logits[0], padded.labels)


def objective_for(model: Any, pad_id: int, *, recompute: bool) -> Objective:
    """The fastest objective that is right for this model."""
    described = describe(model)
    if isinstance(described, Decoder):
        return FastObjective(described, recompute)
    return plain_objective(model, pad_id, described, recompute=recompute)


def plain_objective(model: Any, pad_id: int, why: NotDescribed, *, recompute: bool) -> PlainObjective:
    """The model's own forward, with its own gradient checkpointing where asked for."""
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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
    device: torch.device,
    emit: Emit = silent,
    task: str = "evaluating",
) -> HeldOut:
    """Run held-out batches through an objective."""
    loss, correct, count = 0.0, 0, 0
    for done, batch in enumerate(batches, start=1):
        found = objective(batch.to(device))
        loss, correct = loss + float(found.loss_sum), correct + int(found.correct)
        count += batch.supervised_tokens
        emit(Progress(task=task, done=done, total=len(batches)))
    return HeldOut(loss / count, correct / count, count)
