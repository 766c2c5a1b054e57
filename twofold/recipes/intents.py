"""Home commands asked of a model, and how many of its answers are right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twofold.base.chat import Message
from twofold.base.load import Base
from twofold.events import Emit
from twofold.recipes.generate import GenerationConfig, answers

ANSWER_TOKENS = 56
"""The most of an answer that is waited for: right ones are shorter."""


@dataclass(frozen=True)
class Answered:
    """Answers to the held-out sentences, and how many were right."""

    name: str
    texts: list[str]
    intent_exact: float
    whole_exact: float


def ask(
    name: str, base: Base, conversations: Sequence[Sequence[Message]], expected: Sequence[str], emit: Emit
) -> Answered:
    """Greedy, unconstrained answers, compared with the expected JSON by value."""
    given = answers(
        base, conversations, GenerationConfig(max_new_tokens=ANSWER_TOKENS), emit, task=f"asking the {name}"
    )
    return Answered(name, given, *shares_right(given, expected))


def shares_right(given: Sequence[str], expected: Sequence[str]) -> tuple[float, float]:
    """Of the answers whose intent is the expected one, and of those that are it as a whole, slots and all."""
    pairs = [(first_json(g), json.loads(e)) for g, e in zip(given, expected, strict=True)]
    intents = sum(g.get("intent") == e["intent"] for g, e in pairs)
    return intents / len(pairs), sum(g == e for g, e in pairs) / len(pairs)


def first_json(text: str) -> dict[str, Any]:
    """The first JSON object in an answer, whatever stands around it; empty when there is none."""
    at = text.find("{")
    try:
        found = json.JSONDecoder().raw_decode(text[at:])[0] if at >= 0 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
