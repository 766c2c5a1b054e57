"""Summed loss, and logits, of tasks other than causal language modelling, through the model's own forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from twofold.base.batch import PackedBatch, pad
from twofold.base.head import task_of
from twofold.functional.loss import HeadLoss, logits_loss

IGNORED = -100
"""What transformers takes for no label."""


@dataclass(frozen=True)
class TaskObjective:
    """From a batch on the CPU to the sum of its losses, and to its logits, through the model's own forward."""

    model: Any
    pad_id: int
    path: ClassVar[str]

    def __call__(self, batch: PackedBatch) -> HeadLoss:
        logits = self.logits(batch)
        return logits_loss(logits, batch.labels.to(logits.device))

    def predictions(self, batch: PackedBatch) -> int:
        """How many there are in a batch."""
        raise NotImplementedError

    def logits(self, batch: PackedBatch) -> Float[Tensor, "predictions choices"]:
        """One row for each prediction: an example's class, or an answer's token."""
        raise NotImplementedError


class ClassObjective(TaskObjective):
    """One class for each example."""

    path = "plain path: a classifier runs through its own forward"

    def predictions(self, batch: PackedBatch) -> int:
        return len(batch.lengths)

    def logits(self, batch: PackedBatch) -> Float[Tensor, "examples classes"]:
        padded = pad(batch.to(self.model.device), self.pad_id)
        found: Tensor = self.model(input_ids=padded.token_ids, attention_mask=padded.attention_mask).logits
        return found


class AnswerObjective(TaskObjective):
    """The tokens of an answer, by a decoder that looks at the encoded prompt."""

    path = "plain path: an encoder and decoder run through their own forward"

    def predictions(self, batch: PackedBatch) -> int:
        return batch.supervised_tokens

    def logits(self, batch: PackedBatch) -> Float[Tensor, "supervised vocabulary"]:
        prompts, answers = prompts_and_answers(batch)
        device = self.model.device
        mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True)
        labels = pad_sequence(answers, batch_first=True, padding_value=IGNORED).to(device)
        found: Tensor = self.model(
            input_ids=pad_sequence(prompts, batch_first=True, padding_value=self.pad_id).to(device),
            attention_mask=mask.to(device),
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels=labels),
            use_cache=False,
        ).logits
        return found[labels != IGNORED]


def prompts_and_answers(batch: PackedBatch) -> tuple[list[Tensor], list[Tensor]]:
    """The unsupervised tokens of each example, and its supervised ones."""
    supervised = torch.zeros_like(batch.token_ids, dtype=torch.bool)
    supervised[batch.predicting + 1] = True
    pairs = list(zip(batch.token_ids.split(batch.lengths), supervised.split(batch.lengths), strict=True))
    return [tokens[~answer] for tokens, answer in pairs], [tokens[answer] for tokens, answer in pairs]


def task_objective(model: Any, pad_id: int) -> TaskObjective | None:
    """The objective of a model's task; None for causal language modelling, which has paths of its own."""
    found: dict[str, type[TaskObjective]] = {
        "sequence-classification": ClassObjective,
        "seq2seq": AnswerObjective,
    }
    kind = found.get(task_of(model))
    return None if kind is None else kind(model, pad_id)
