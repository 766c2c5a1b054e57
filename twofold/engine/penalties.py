"""The penalties for tokens that were there before, of all rows at once: only logits of such tokens are touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from twofold.engine.request import Request


class Counted:
    """The tokens of one request's prompt and answer, each once, and how often the answer has it."""

    def __init__(self, request: Request) -> None:
        self.sampling = request.sampling
        prompt = sorted(set(request.token_ids))
        self._place = {token: i for i, token in enumerate(prompt)}
        self._tokens = np.zeros(len(prompt) + request.max_new_tokens + 1, np.int64)
        self._tokens[: len(prompt)] = prompt
        self._made = np.zeros(len(self._tokens), np.float32)

    def take(self, token: int) -> None:
        """The answer has one more token."""
        place = self._place.setdefault(token, len(self._place))
        self._tokens[place] = token
        self._made[place] += 1

    @property
    def tokens(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self._tokens[: len(self._place)]

    @property
    def made(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return self._made[: len(self._place)]


def penalise(logits: Float[Tensor, "rows vocabulary"], counted: Sequence[Counted | None]) -> None:
    """Repetition, then frequency and presence penalties, in place; rows of None have none."""
    found = [(row, c) for row, c in enumerate(counted) if c is not None]
    if not found:
        return
    lengths = [len(c.tokens) for _, c in found]
    rows = np.repeat([row for row, _ in found], lengths)
    repetition, frequency, presence = (
        torch.from_numpy(np.repeat(np.array(values, np.float32), lengths)).to(logits.device)
        for values in zip(
            *(
                (c.sampling.repetition_penalty, c.sampling.frequency_penalty, c.sampling.presence_penalty)
                for _, c in found
            ),
            strict=True,
        )
    )
    made = torch.from_numpy(np.concatenate([c.made for _, c in found])).to(logits.device)
    at = torch.from_numpy(rows * logits.shape[1] + np.concatenate([c.tokens for _, c in found])).to(logits.device)
    flat = logits.view(-1)
    before = flat[at]
    after = torch.where(before > 0, before / repetition, before * repetition)
    flat[at] = after - frequency * made - presence * made.sign()
