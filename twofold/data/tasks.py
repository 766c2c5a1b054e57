"""Rows for tasks other than language modelling: texts with a class, and prompts with an answer of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from twofold.base.batch import Example
from twofold.data.examples import DataConfig, Examples, fit
from twofold.data.formats import Columns, Table, read_table
from twofold.errors import DataError, did_you_mean

LABELLED: Columns = {"labelled": ("text", "label")}
ANSWERED: Columns = {"prompt-completion": ("prompt", "completion")}


def find_labels(source: str) -> tuple[str, ...]:
    """The names of the classes that occur in training data: names in alphabetical order, numbers by size.

    Raises:
        DataError: a label is neither a name nor a whole number, names and numbers are mixed, or all rows have one class.
    """
    table = read_table(source, LABELLED)
    found = {_label(row, place): row["label"] for place, row in _places(table)}
    if len({isinstance(v, str) for v in found.values()}) > 1:
        raise DataError(f"the labels of {source} are names in some rows and numbers in others; use one of them")
    if len(found) < 2:
        raise DataError(f"all rows of {source} have the label {next(iter(found))!r}, so there is nothing to tell apart")
    return tuple(sorted(found, key=lambda name: found[name]))


def classified(source: str, config: DataConfig, tokenizer: Any, labels: Sequence[str]) -> Examples:
    """Texts with their classes, counted from 0 in the order of `labels`.

    Raises:
        DataError: unreadable, over-long where that is refused, or of a class that is not among the labels.
    """
    table = read_table(source, LABELLED)
    numbers = {name: i for i, name in enumerate(labels)}
    rendered = [_classified(row, place, tokenizer, numbers) for place, row in _places(table)]
    found = fit(rendered, table, config)
    counts = Counter(e.label for e in found.items)
    return Examples(found.items, replace(found.report, classes={name: counts[i] for name, i in numbers.items()}))


def answered(source: str, config: DataConfig, tokenizer: Any) -> Examples:
    """Prompts for an encoder, each followed by what the decoder answers, which is supervised.

    Raises:
        DataError: unreadable, an empty prompt, or over-long where that is refused.
    """
    table = read_table(source, ANSWERED)
    return fit([_answered(row, place, tokenizer) for place, row in _places(table)], table, config)


def questions(source: str) -> list[tuple[str, str]]:
    """Prompts for an encoder, and what the decoder is to answer, as text.

    Raises:
        DataError: unreadable, or one of both is no text.
    """
    rows = _places(read_table(source, ANSWERED))
    return [(_text(row, "prompt", place), _text(row, "completion", place)) for place, row in rows]


def _places(table: Table) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"{table.source}, example {i}", row) for i, row in enumerate(table.rows, start=1)]


def _classified(row: Mapping[str, Any], place: str, tokenizer: Any, numbers: Mapping[str, int]) -> Example:
    tokens = tokenizer(_text(row, "text", place))["input_ids"]
    name = _label(row, place)
    if name not in numbers:
        raise DataError(f"{place}: the label {name!r} is none of the training data's{did_you_mean(name, numbers)}")
    return Example(tokens, [False] * len(tokens), numbers[name])


def _answered(row: Mapping[str, Any], place: str, tokenizer: Any) -> Example:
    prompt = tokenizer(_text(row, "prompt", place))["input_ids"]
    answer = tokenizer(text_target=_text(row, "completion", place))["input_ids"]
    return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def _label(row: Mapping[str, Any], place: str) -> str:
    value = row["label"]
    if not isinstance(value, int | str) or value == "":
        raise DataError(f"{place}: a label must be a name or a whole number, found {value!r:.80}")
    return str(value)


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    if not isinstance(row[column], str) or not row[column].strip():
        raise DataError(f"{place}: expected text in '{column}', found {row[column]!r:.80}")
    return str(row[column])
