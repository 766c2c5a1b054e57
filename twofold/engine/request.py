"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from twofold.engine.grammar import Grammar
from twofold.errors import AnswerError, ConfigError

GREEDY_BELOW = 1e-5
"""A temperature under this takes the likeliest token: its other tokens' shares are too small to be drawn."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    The logits are changed in this order, which is vLLM's: grammar, logit_bias, repetition, frequency and presence
    penalty, temperature, min_p, top_k, top_p. A token of the prompt counts for the repetition penalty alone.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: only among so many likeliest, and those as likely as the last of them; 0 for all.
        top_p: only among the likeliest that together have this probability.
        min_p: only those at least this many times as likely as the likeliest; 0 for all.
        presence_penalty: off the logit of each token that the answer has already; -2 to 2.
        frequency_penalty: off the logit of each token for every time that the answer has it already; -2 to 2.
        repetition_penalty: by which logits of tokens in prompt and answer are divided, or multiplied where they are
            negative (arXiv 1909.05858); 1 for none.
        logit_bias: token to what is added to its logit; -100 to 100.
        logprobs: how many likeliest tokens are reported beside the chosen one, with their log-probabilities in the
            model's own distribution, before anything above changes it; 0 for the chosen one alone, none for no report.
        seed: of this request's own random stream, which its neighbours do not touch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "at least 0")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0, which is for all tokens")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "at least 0 and at most 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), -2 <= getattr(self, name) <= 2, "from -2 to 2")
        _check(
            "repetition_penalty", self.repetition_penalty, 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"
        )
        for token, bias in self.logit_bias.items():
            _check("a key of logit_bias", token, token >= 0, "the number of a token, which is at least 0")
            _check(f"logit_bias[{token}]", bias, -100 <= bias <= 100, "from -100 to 100")
        _check("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, "at least 0")
        _check("seed", self.seed, -(2**63) <= self.seed < 2**64, "a number of 64 bits")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken and none drawn."""
        return self.temperature < GREEDY_BELOW


def _check(name: str, value: object, right: bool, words: str) -> None:
    if not right:
        raise ConfigError(f"{name} is {value} but must be {words}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be continued.

    Attributes:
        token_ids: the prompt.
        max_new_tokens: the most tokens to make.
        stop_ids: tokens that end the answer; they are not part of it. Without any it has max_new_tokens.
        sampling: how each token is chosen.
        adapters: which adapters of the pool, with a weight each; none for the bare base.
        grammar: the form that the answer must have, if any.
    """

    token_ids: list[int]
    max_new_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    adapters: Mapping[str, float | int] = field(default_factory=dict)
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not self.token_ids:
            raise ConfigError("a request needs a prompt of at least one token, and max_new_tokens of at least 1")
        if self.grammar is None:
            return
        if foreign := sorted(set(self.grammar.end_ids) - set(self.stop_ids)):
            raise ConfigError(f"the grammar ends answers with the tokens {foreign}, which stop_ids must have too")

    def check_vocabulary(self, size: int) -> None:
        """Raise ConfigError if the prompt or logit_bias name a token that a vocabulary of this size does not have."""
        beyond = max((*self.token_ids, *self.sampling.logit_bias))
        if beyond >= size or min(self.token_ids) < 0:
            wrong = beyond if beyond >= size else min(self.token_ids)
            raise ConfigError(f"there is no token {wrong} in the model's vocabulary, which goes from 0 to {size - 1}")


class TokenLogprobs(NamedTuple):
    """Natural log-probabilities at one token, in the model's own distribution: before penalties, bias, grammar,
    temperature and cuts.

    Attributes:
        token: the chosen one.
        logprob: its own.
        likeliest: token and log-probability of as many as were asked for, likeliest first.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to a request: `stop` when it ended itself, `length` when it was cut off.

    Attributes:
        token_ids: the tokens made, a stop id not among them.
        finish_reason: why it ended.
        logprobs: one for each token, if the request asked for them.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length", "cancelled", "error"]
    logprobs: list[TokenLogprobs] | None = None


def cannot_go_on(reason: str | None, *, form: bool) -> AnswerError:
    """The error of an answer that broke off; `form`: what broke is the form that it should have."""
    way_out = "ask for a simpler form" if form else "see whether the adapter or the weights overflow"
    return AnswerError(f"the answer could not go on: {reason}; {way_out}")
