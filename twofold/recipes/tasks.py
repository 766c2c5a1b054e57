"""What differs by task in a training, one object a task: the head of the base, rows to examples, what is trained whole, and
what an evaluation says. How a batch becomes a loss and logits follows from the loaded model: `training.tasks`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from twofold.adapter.config import LoraConfig
from twofold.adapter.files import OURS, AdapterFiles
from twofold.adapter.names import matches_around
from twofold.base.head import Head, TaskName, head_modules, head_of, labels_of
from twofold.base.load import Base
from twofold.data.examples import DataConfig, Examples, load_examples
from twofold.data.tasks import answered, classified, find_labels
from twofold.errors import ConfigError
from twofold.events import Emit, Message
from twofold.recipes.adapters import recorded_head
from twofold.recipes.settings import TrainConfig
from twofold.training.objective import HeldOut

POSITION_TABLES = {
    "wpe",
    "embed_positions",
    "position_embedding",
    "position_embeddings",
    "positions_embed",
    "pos_encoding",
}
"""What transformers' causal models call their tables of positions."""


@dataclass(frozen=True)
class Task:
    """Causal language modelling; others differ where they say so."""

    name: TaskName = "causal-lm"

    def head(self, config: TrainConfig) -> Head:
        """What the base is loaded to predict with."""
        return Head(task=self.name)

    def limited(self, data: DataConfig, base: Base, emit: Emit) -> DataConfig:
        """The settings of the data with `max_length` at most what the base has places for, which is said.

        Raises:
            ConfigError: a setting of the data that this task knows nothing of.
        """
        return at_most(learned_positions(base.model), data, emit)

    def examples(self, source: str, data: DataConfig, base: Base, emit: Emit) -> Examples:
        """A data set as the model will see it; its settings are `limited` already.

        Raises:
            DataError: as `load_examples`.
        """
        return load_examples(source, data, base.renderer, emit)

    def adapter(self, config: LoraConfig, base: Base) -> LoraConfig:
        """The settings of the adapter, with what the task itself needs."""
        return config

    def check_continues(self, files: AdapterFiles, base: Base) -> None:
        """Refuse to go on from an adapter that was trained for something else.

        Raises:
            ConfigError: another task, or other classes.
        """
        theirs, ours = recorded_head([files.path]), head_of(base.model)
        if theirs and (files.path / OURS).is_file() and (theirs.task, theirs.labels) != (ours.task, ours.labels):
            raise ConfigError(
                f"{files.path} was trained for {theirs.task} with labels {list(theirs.labels)}, not for {ours.task} with "
                f"{list(ours.labels)}; train from the base, or give it the data it is for"
            )

    def figures(self, found: HeldOut) -> dict[str, Any]:
        """What the report says of an evaluation."""
        return asdict(found)

    def evaluated(self, found: HeldOut, examples: Examples) -> dict[str, Any]:
        """What `twofold eval` says of one."""
        perplexity = math.exp(min(found.loss, 700))
        return {**self.figures(found), "perplexity": perplexity, "examples": len(examples.items)}

    def provenance(self, base: Base) -> dict[str, Any]:
        """What an adapter keeps, so that its answers are understood elsewhere."""
        return {}


class SequenceClassification(Task):
    """Texts with labels; the head starts at random, unless the base has one, and is trained whole."""

    def head(self, config: TrainConfig) -> Head:
        return Head(task=self.name, labels=find_labels(config.data.train), seed=config.training.seed)

    def limited(self, data: DataConfig, base: Base, emit: Emit) -> DataConfig:
        return within_base(data, base, emit)

    def examples(self, source: str, data: DataConfig, base: Base, emit: Emit) -> Examples:
        return classified(source, data, base.tokenizer, labels_of(base.model))

    def adapter(self, config: LoraConfig, base: Base) -> LoraConfig:
        """Whatever the base's files lack is trained whole, or the adapter's file would lack it too."""
        chosen = tuple(config.modules_to_save or head_modules(base.model))
        made = dict.fromkeys(n.rpartition(".")[0] for n in base.made)
        return replace(config, modules_to_save=(*chosen, *(m for m in made if not matches_around(chosen, m))))

    def figures(self, found: HeldOut) -> dict[str, Any]:
        return {"loss": found.loss, "accuracy": found.token_accuracy, "examples": found.tokens}

    def evaluated(self, found: HeldOut, examples: Examples) -> dict[str, Any]:
        return self.figures(found)

    def provenance(self, base: Base) -> dict[str, Any]:
        return {"task": self.name, "labels": list(labels_of(base.model))}


class Seq2Seq(Task):
    """Prompts for an encoder, answers of a decoder."""

    def limited(self, data: DataConfig, base: Base, emit: Emit) -> DataConfig:
        return within_base(data, base, emit)

    def examples(self, source: str, data: DataConfig, base: Base, emit: Emit) -> Examples:
        return answered(source, data, base.tokenizer)

    def provenance(self, base: Base) -> dict[str, Any]:
        return {"task": self.name}


def learned_positions(model: Any) -> float:
    """How many positions the base has a table for; infinite where it computes them, as rotary embeddings do."""
    parts = {name.rpartition(".")[2] for named in (model.named_modules(), model.named_buffers()) for name, _ in named}
    return float(model.config.max_position_embeddings) if parts & POSITION_TABLES else math.inf


def at_most(tokens: int | float, data: DataConfig, emit: Emit) -> DataConfig:
    """The settings of the data with a `max_length` that a base of so many tokens can take, which is said where it is less."""
    if data.max_length <= tokens:
        return data
    emit(Message(text=f"data.max_length is {int(tokens)}, for this base takes no more tokens"))
    return replace(data, max_length=int(tokens))


def within_base(data: DataConfig, base: Base, emit: Emit) -> DataConfig:
    """The settings of the data with `max_length` at most what the base has learned positions for.

    Raises:
        ConfigError: a system message, which nothing here takes.
    """
    if data.system is not None:
        raise ConfigError(
            f"a system message belongs to a conversation, and a {head_of(base.model).words} has none; leave it out"
        )
    positions = getattr(base.model.config, "max_position_embeddings", None) or data.max_length
    return at_most(min(positions, base.tokenizer.model_max_length), data, emit)


TASKS: dict[TaskName, Task] = {
    t.name: t for t in (Task(), SequenceClassification("sequence-classification"), Seq2Seq("seq2seq"))
}
