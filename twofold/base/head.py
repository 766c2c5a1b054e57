"""What a base is to predict with: the next token, a class of the whole text, or an answer apart from its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import nn

from twofold.errors import BaseError
from twofold.layers.protocol import adopt

TaskName = Literal["causal-lm", "sequence-classification", "seq2seq"]
CLASSES: dict[TaskName, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
"""How transformers names what loads a model for a task."""
WORDS: dict[TaskName, str] = {
    "causal-lm": "causal language model",
    "sequence-classification": "sequence classifier",
    "seq2seq": "sequence-to-sequence model",
}


@dataclass(frozen=True, kw_only=True)
class Head:
    """The task a base is loaded for.

    Attributes:
        labels: names of the classes in the order of the logits; empty but for classification.
        seed: of a classification head that the base's files lack; it has the same bits wherever it is made.
    """

    task: TaskName = "causal-lm"
    labels: tuple[str, ...] = ()
    seed: int = 0

    @property
    def words(self) -> str:
        return WORDS[self.task]

    def loader(self) -> Any:
        """The class of transformers that loads such a model."""
        return getattr(transformers, CLASSES[self.task])

    def settings(self) -> dict[str, Any]:
        """What the model's own config has to say."""
        if not self.labels:
            return {}
        numbered = dict(enumerate(self.labels))
        return {"id2label": numbered, "label2id": {name: i for i, name in numbered.items()}}

    def made(self, model: nn.Module, told: Mapping[str, Any]) -> list[str]:
        """The parameters that a base's files may lack, and lack: a classification head's, and its pooler's.

        Args:
            told: what transformers says of its reading.
        """
        if self.task != "sequence-classification":
            return []
        body = f"{getattr(model, 'base_model_prefix', '')}."
        outside = (body + "pooler.",)
        return sorted(n for n in told["missing_keys"] if not n.startswith(body) or n.startswith(outside))


def draw_again(model: Any, made: Sequence[str], seed: int) -> None:
    """Give parameters that a base's files lack the bits that loading it with a `Head` of another seed gives them.

    transformers goes over the modules in the same order and draws what is not marked as read.
    """
    if not made:
        return
    with torch.device("meta"):
        twin = type(model)(model.config)
    for module in twin.modules():
        module._is_hf_initialized = False
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor._is_hf_initialized = True
    for name in made:
        place, _, own = name.rpartition(".")
        drawn = nn.Parameter(torch.empty_like(model.get_parameter(name), device="cpu"))
        setattr(twin.get_submodule(place), own, drawn)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin.initialize_weights()
    for name in made:
        adopt(model.get_parameter(name), twin.get_parameter(name).detach())


def task_of(model: Any) -> TaskName:
    """The task that a loaded model is for."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "sequence-classification"
    return "seq2seq" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "causal-lm"


def head_modules(model: Any) -> tuple[str, ...]:
    """The modules of a classifier that lie beside its body: its head.

    Raises:
        BaseError: the model has none.
    """
    body = model.base_model_prefix
    found = tuple(n for n, m in model.named_children() if n != body and any(True for _ in m.parameters()))
    if not found:
        raise BaseError(f"{type(model).__name__} has no classification head beside '{body}'")
    return found


def head_of(model: Any) -> Head:
    """The head that a loaded model has."""
    task = task_of(model)
    return Head(task=task, labels=labels_of(model) if task == "sequence-classification" else ())


def labels_of(model: Any) -> tuple[str, ...]:
    """A classifier's class names in the order of its logits."""
    return tuple(model.config.id2label[i] for i in range(model.config.num_labels))
