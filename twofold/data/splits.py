"""What the built-in data sets share: two splits of chat rows, and the two files that hold them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from twofold.atomic import write_text
from twofold.errors import DataError

Row: TypeAlias = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Splits:
    """Chat rows to learn from, and rows held out."""

    train: list[Row]
    evaluation: list[Row]


def chat_row(system: str, user: str, assistant: str) -> Row:
    """The conversation that teaches one answer."""
    contents = {"system": system, "user": user, "assistant": assistant}
    return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def check_counts(train_examples: int, evaluation_examples: int) -> None:
    """Raises DataError unless both splits are to hold something."""
    if min(train_examples, evaluation_examples) < 1:
        raise DataError(f"{train_examples} training and {evaluation_examples} evaluation examples: ask for 1 or more")


def write_splits(folder: Path, splits: Splits) -> None:
    """Write `train.jsonl` and `evaluation.jsonl` into `folder`, each whole or not at all.

    Raises:
        RunError: the folder cannot be written.
    """
    for name, rows in (("train", splits.train), ("evaluation", splits.evaluation)):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
