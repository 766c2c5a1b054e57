"""The form that an answer must have: a JSON schema, a regular expression or a Lark grammar, compiled by llguidance.

A compiled grammar tells at each token which tokens may follow, as one bit a token. What it lets through is exactly what
can still become an answer of that form, so an answer that ends has the form; one that max_new_tokens cuts off may not.
https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from twofold.errors import ConfigError

BETWEEN = r"[ \n\r\t]{1,32}"
"""The white space that JSON may have between its parts: without a limit, small models write nothing else until cut off."""
KEPT = 256
"""Compiled grammars that are kept for the next request with the same text."""


@dataclass(frozen=True)
class Grammar:
    """A compiled form; `Grammars` makes them.

    Attributes:
        words: what it is, for people: "a JSON schema", ...
        end_ids: the tokens that may end an answer where the form is complete.
        start: the matcher before the first token, which stays there.
    """

    words: str
    end_ids: tuple[int, ...]
    start: Any = field(repr=False)

    def matcher(self) -> Matcher:
        """A matcher for one answer, at its beginning."""
        return Matcher(self.start.deep_copy(), self.words)


class Matcher:
    """How far one answer has come in its grammar, which `words` name."""

    def __init__(self, matcher: Any, words: str) -> None:
        self._matcher, self._words = matcher, words

    @property
    def complete(self) -> bool:
        """Whether the form is complete and nothing more may follow but the end."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """What went wrong within the grammar, if anything did: it grew too complex, or took a token that it forbids."""
        if not self._matcher.is_error():
            return None
        reason = _reason(self._matcher.get_error())
        return f"{self._words} cannot be followed any further: {reason}; ask for a simpler form"

    def allowed(self, vocabulary: int) -> Bool[Tensor, " vocabulary"]:
        """Which tokens may come next; on the CPU."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        known = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[:vocabulary]
        return torch.nn.functional.pad(known, (0, vocabulary - len(known)))

    def take(self, token: int) -> None:
        """Go on by one token; a token that is not allowed makes `error`."""
        self._matcher.consume_token(token)


class Grammars:
    """Grammars over one tokenizer, each text compiled once.

    Args:
        tokenizer: a fast transformers tokenizer.
        end_ids: the tokens that end an answer: the request's stop ids.

    Raises:
        ConfigError: the tokenizer is none that llguidance reads, or there is no end token.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        if not end_ids:
            raise ConfigError("a grammar needs a token that ends the answer; give the base an eos token")
        self.end_ids = tuple(end_ids)
        self._tokenizer = _readable(tokenizer, list(end_ids))
        self._compiled = lru_cache(maxsize=KEPT)(self._compile)

    def json_schema(self, schema: Mapping[str, Any] | str) -> Grammar:
        """Answers that are JSON and valid against the schema; its `x-guidance` may set llguidance's own options.

        Raises:
            ConfigError: the schema is no schema, or asks for what cannot be kept to token by token.
        """
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return self._compiled("json_schema", text, "the JSON schema")

    def json_object(self) -> Grammar:
        """Answers that are any JSON object."""
        return self._compiled("json_schema", '{"type": "object"}', "a JSON object")

    def regex(self, pattern: str) -> Grammar:
        """Answers that match the pattern from first to last character; its syntax is that of Rust's `regex`.

        Raises:
            ConfigError: the pattern cannot be read.
        """
        return self._compiled("regex", pattern, f"the regular expression {pattern!r}")

    def choice(self, options: Sequence[str]) -> Grammar:
        """Answers that are one of the options, letter for letter.

        Raises:
            ConfigError: there is no option, or one is empty.
        """
        if not options or not all(options):
            raise ConfigError("a choice needs at least one option, and none of them may be empty")
        return self._compiled("choice", json.dumps(list(options)), "the choice")

    def lark(self, text: str) -> Grammar:
        """Answers that a context-free grammar in llguidance's dialect of Lark makes, from its rule `start`.

        Raises:
            ConfigError: the grammar cannot be read.
        """
        return self._compiled("lark", text, "the Lark grammar")

    def _compile(self, kind: Any, text: str, words: str) -> Grammar:
        from llguidance import LLMatcher, grammar_from

        try:
            if kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": BETWEEN})
            else:
                grammar = grammar_from(kind, text)
        except ValueError as error:
            raise ConfigError(f"{words} cannot be followed: {_reason(str(error))}") from error
        if wrong := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise ConfigError(f"{words} cannot be followed: {_reason(wrong)}")
        return Grammar(words, self.end_ids, LLMatcher(self._tokenizer, grammar, log_level=0))


def _readable(tokenizer: Any, end_ids: list[int]) -> Any:
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(tokenizer, eos_token=end_ids)
    except Exception as error:
        raise ConfigError(f"grammars cannot be used with this tokenizer: {_reason(str(error))}") from error


def _reason(text: str) -> str:
    """The line that says what is wrong; a drawing of the pattern comes before it where there is one."""
    lines = [line.strip().rstrip(".") for line in text.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return next(iter([*told, *lines]), "no reason was given")
