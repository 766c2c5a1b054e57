"""`twofold eval`: loss, perplexity and accuracy on held-out data, and exact match of generated answers."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from twofold.base.load import Base
from twofold.data.examples import DataConfig, load_examples, with_system
from twofold.data.formats import as_messages, read_table
from twofold.errors import DataError
from twofold.events import Emit, silent
from twofold.recipes.generate import GenerationConfig, answers
from twofold.recipes.train import held_out_loss


def evaluate(base: Base, data: DataConfig, emit: Emit = silent) -> dict[str, Any]:
    """Loss, perplexity and token accuracy of the model as it stands, on the data of `data.train`."""
    examples = load_examples(data.train, data, base.renderer, emit)
    found = held_out_loss(base, examples, emit)
    return {**asdict(found), "perplexity": math.exp(min(found.loss, 700)), "examples": len(examples.items)}


def exact_match(base: Base, data: DataConfig, config: GenerationConfig, emit: Emit = silent) -> dict[str, Any]:
    """Share of conversations whose last answer is generated letter for letter, white space at its ends aside.

    Raises:
        DataError: the data has no answers to compare with.
    """
    table = read_table(data.train)
    if table.format == "text":
        raise DataError(f"{data.train} is plain text, which has no answers to match; leave out --generate")
    rows = [as_messages(r, table.format, f"{data.train}, example {i + 1}") for i, r in enumerate(table.rows)]
    conversations = [with_system(m, data.system) for m in rows if m[-1]["role"] == "assistant"]
    if not conversations:
        raise DataError(f"{data.train} has no answers to match: no conversation ends with the assistant's turn")
    given = answers(base, [c[:-1] for c in conversations], config, emit)
    right = [g.strip() == c[-1]["content"].strip() for g, c in zip(given, conversations, strict=True)]
    return {"exact_match": sum(right) / len(right), "generated": len(right)}
