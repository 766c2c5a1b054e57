"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from twofold.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: only among so many likeliest; 0 for all.
        top_p: only among the likeliest that together have this probability.
        seed: of this request's own random stream, which its neighbours do not touch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError("temperature and top_k must be at least 0, and top_p above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be continued.

    Attributes:
        token_ids: the prompt.
        max_new_tokens: the most tokens to make.
        stop_ids: tokens that end the answer; they are not part of it.
    """

    token_ids: list[int]
    max_new_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not self.token_ids:
            raise ConfigError("a request needs a prompt of at least one token, and max_new_tokens of at least 1")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to a request: `stop` when it ended itself, `length` when it was cut off."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
