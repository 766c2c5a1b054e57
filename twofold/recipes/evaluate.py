"""`twofold eval`: loss, perplexity and accuracy on held-out data, and exact match of generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twofold.base.chat import Message
from twofold.base.head import task_of
from twofold.base.load import Base
from twofold.data.examples import DataConfig, with_system
from twofold.data.formats import as_messages, read_table, tools_of
from twofold.data.tasks import questions
from twofold.errors import DataError
from twofold.events import Emit, silent
from twofold.recipes.generate import GenerationConfig, answers, check_generates
from twofold.recipes.tasks import TASKS
from twofold.recipes.train import held_out_loss


def evaluate(base: Base, data: DataConfig, emit: Emit = silent) -> dict[str, Any]:
    """What the base's task measures of the model as it stands, on the data of `data.train`: loss, perplexity and token accuracy;
    of a classifier loss and accuracy over examples.

    Raises:
        UserError: the data is not of this task, or cannot be read.
    """
    task = TASKS[task_of(base.model)]
    examples = task.examples(data.train, task.limited(data, base, emit), base, emit)
    return task.evaluated(held_out_loss(base, examples, emit), examples)


def exact_match(base: Base, data: DataConfig, config: GenerationConfig, emit: Emit = silent) -> dict[str, Any]:
    """Share of questions whose answer is generated letter for letter, white space at its ends aside: in a conversation the last
    answer.

    Raises:
        ConfigError: the base names classes and generates nothing.
        DataError: the data has no answers to compare with.
    """
    check_generates(base)
    asked = _prompts(data.train) if task_of(base.model) == "seq2seq" else _conversations(data)
    given = answers(base, [messages for messages, _ in asked], config, emit)
    right = [g.strip() == expected.strip() for g, (_, expected) in zip(given, asked, strict=True)]
    return {"exact_match": sum(right) / len(right), "generated": len(right)}


def _prompts(source: str) -> list[tuple[Sequence[Message], str]]:
    return [([{"role": "user", "content": prompt}], answer) for prompt, answer in questions(source)]


def _conversations(data: DataConfig) -> list[tuple[Sequence[Message], str]]:
    table = read_table(data.train)
    if table.format == "text":
        raise DataError(f"{data.train} is plain text, which has no answers to match; leave out --generate")
    if any(tools_of(r, data.train) for r in table.rows):
        raise DataError(f"{data.train} has tools, and answers are generated without them; leave out --generate")
    rows = [as_messages(r, table.format, f"{data.train}, example {i + 1}") for i, r in enumerate(table.rows)]
    found = [with_system(m, data.system) for m in rows if m[-1]["role"] == "assistant"]
    if not found:
        raise DataError(f"{data.train} has no answers to match: no conversation ends with the assistant's turn")
    return [(m[:-1], m[-1]["content"]) for m in found]
