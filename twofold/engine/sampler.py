"""The choice of the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.engine.request import Sampling


class Sampler:
    """The random stream of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Float[Tensor, " vocabulary"]) -> int:
        """One token by temperature, top-k and top-p (arXiv 1904.09751)."""
        scaled, order = torch.sort(logits.float().cpu() / self.sampling.temperature, descending=True)
        if self.sampling.top_k:
            scaled = scaled[: self.sampling.top_k]
        p = torch.softmax(scaled, 0)
        p = p.masked_fill(p.cumsum(0) - p >= self.sampling.top_p, 0.0)
        return int(order[torch.multinomial(p, 1, generator=self.generator)])


def choose(logits: Float[Tensor, "streams vocabulary"], samplers: Sequence[Sampler | None]) -> list[int]:
    """The next token of every stream; where no sampler waits for it, any token."""
    likeliest: list[int] = logits.argmax(-1).tolist()
    return [
        sampler.choose(row) if sampler is not None and sampler.sampling.temperature > 0 else token
        for sampler, row, token in zip(samplers, logits, likeliest, strict=True)
    ]
