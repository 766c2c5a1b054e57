"""What the trainings are compared on. A case writes train.jsonl and evaluation.jsonl; everything else follows from these."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from twofold.base.chat import Renderer
from twofold.base.load import DEFAULT_BASE, load_renderer
from twofold.data import home_intents, king_james
from twofold.data.splits import Row, Splits, chat_row, write_splits

TOKENS_PER_STEP = 4096
LENGTHS = (256, 512, 1024, 2048, 4096)
WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these"
)


@dataclass(frozen=True)
class Sizes:
    """How much: `examples` and `held_out` of real data, `steps` where the lengths are made to measure."""

    examples: int
    held_out: int
    steps: int


@dataclass(frozen=True)
class Case:
    """`batch` examples make a step; `peer` is the side to compare with, if any."""

    batch: int
    peer: str | None
    write: Callable[[Path, Sizes], Any]


def _home_intents(folder: Path, sizes: Sizes) -> None:
    home_intents.write(folder, sizes.examples, sizes.held_out)


def _king_james(folder: Path, sizes: Sizes) -> None:
    king_james.write(folder, sizes.examples, sizes.held_out)


def _words(length: int, batch: int, folder: Path, sizes: Sizes) -> None:
    """Examples of exactly `length` tokens, the second half of them supervised."""
    renderer, rng = load_renderer(DEFAULT_BASE), random.Random(length)
    rows = [_row_of(length, renderer, rng) for _ in range(batch * sizes.steps + 4)]
    write_splits(folder, Splits(rows[4:], rows[:4]))


def _row_of(length: int, renderer: Renderer, rng: random.Random) -> Row:
    """Words that are one token each fill up what the template leaves."""
    total, supervised = _tokens(_chat(1, 1, rng), renderer)
    answer = 1 + length // 2 - supervised
    row = _chat(length - total + 2 - answer, answer, rng)
    if _tokens(row, renderer) != (length, length // 2):
        raise AssertionError(f"{_tokens(row, renderer)} tokens, not {length} with half of them supervised")
    return row


def _chat(question: int, answer: int, rng: random.Random) -> Row:
    return chat_row("Go on.", *(" ".join(["the", *rng.choices(WORDS.split(), k=n - 1)]) for n in (question, answer)))


def _tokens(row: Row, renderer: Renderer) -> tuple[int, int]:
    (example,) = renderer.chat(row["messages"])
    return len(example.token_ids), example.supervised_tokens


def _of_length(length: int) -> Case:
    batch = TOKENS_PER_STEP // length
    return Case(batch, None, partial(_words, length, batch))


CASES = {
    "home-intents": Case(16, "TRL + PEFT", _home_intents),
    "king-james": Case(16, "TRL + PEFT", _king_james),
    "raw-loop": Case(4, "plain loop + PEFT", partial(_words, 256, 4)),
    **{f"length-{n}": _of_length(n) for n in LENGTHS},
}
"""By name. `raw-loop` is 4 x 256 tokens against the loop that anyone would write; the lengths stand against each other."""
