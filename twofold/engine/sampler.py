"""The choice of the next token from logits, for all streams at once; a row's result is made of its own numbers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.engine.draw import at_share, column, cut, likeliest
from twofold.engine.penalties import Counted, penalise
from twofold.engine.request import Request, TokenLogprobs

CACHED = 2**18
"""Logits that are worked on at a time on a CPU: they stay in its cache from one operation to the next."""


class Choice(NamedTuple):
    """A token, and its log-probabilities if the request asked for them."""

    token: int
    logprobs: TokenLogprobs | None


class Sampler:
    """One request's state: its random stream, the tokens that its penalties count, and where it is in its grammar."""

    def __init__(self, request: Request) -> None:
        self.request, self.sampling = request, request.sampling
        self.matcher = request.grammar.matcher() if request.grammar else None
        self.failed: str | None = None
        self._generator = torch.Generator().manual_seed(self.sampling.seed)
        self._counted = Counted(request) if self.counts else None

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete, so that nothing but a stop id can follow."""
        return self.matcher is not None and self.matcher.complete

    @property
    def error(self) -> str | None:
        """Why this request cannot go on, if so; its neighbours can."""
        return self.failed or (self.matcher.error if self.matcher else None)

    @property
    def counts(self) -> bool:
        """Whether earlier tokens matter."""
        s = self.sampling
        return bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1)

    @property
    def plain(self) -> bool:
        """Whether its next token is that of the greatest logit, as the model gives them."""
        return self.sampling.greedy and not (self.counts or self.sampling.logit_bias or self.matcher)

    def change(self, logits: Float[Tensor, " vocabulary"]) -> None:
        """Apply grammar and bias, in place."""
        s = self.sampling
        if self.matcher:
            logits.masked_fill_(~self.matcher.allowed(len(logits)).to(logits.device), -torch.inf)
        if s.logit_bias:
            tokens = torch.tensor(list(s.logit_bias), device=logits.device)
            logits[tokens] += torch.tensor(list(s.logit_bias.values()), device=logits.device)

    def uniform(self) -> float:
        """The next number of its random stream, at least 0 and below 1."""
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def take(self, token: int) -> None:
        """Take in the token that was chosen."""
        if self._counted is not None:
            self._counted.take(token)
        if self.matcher:
            self.matcher.take(token)

    @property
    def counted(self) -> Counted | None:
        """What its penalties count, if it has any."""
        return self._counted


@torch.inference_mode()
def choose(logits: Float[Tensor, "streams vocabulary"], samplers: Sequence[Sampler | None]) -> list[Choice | None]:
    """The next token of every stream, none where no sampler waits for it; each sampler takes its token in."""
    waiting = {i: s for i, s in enumerate(samplers) if s is not None}
    tokens = _plain(logits, waiting)
    for pick, greedy in ((_greatest, True), (_drawn, False)):
        rows = [i for i, s in waiting.items() if not s.plain and s.sampling.greedy == greedy]
        for part in _parts(rows, logits):
            tokens |= zip(part, pick(_changed(logits, part, waiting), [waiting[i] for i in part]).tolist(), strict=True)
    found = _logprobs(logits, tokens, waiting)
    for i, sampler in waiting.items():
        sampler.take(tokens[i])
    return [Choice(tokens[i], found.get(i)) if i in waiting else None for i in range(len(samplers))]


def _plain(logits: Tensor, samplers: Mapping[int, Sampler]) -> dict[int, int]:
    """The likeliest token of the rows that want no more: for the whole batch at once, and uncopied."""
    rows = [i for i, s in samplers.items() if s.plain]
    if not rows:
        return {}
    found, at = likeliest(logits), torch.tensor(rows, device=logits.device)
    _without_peak(logits.gather(1, found[:, None])[at], [samplers[i] for i in rows])
    return dict(zip(rows, found[at].tolist(), strict=True))


def _changed(logits: Tensor, rows: Sequence[int], samplers: Mapping[int, Sampler]) -> Float[Tensor, "rows vocabulary"]:
    """A copy of these rows in float32, as their requests change them."""
    copied = logits.index_select(0, torch.tensor(rows, device=logits.device)).float()
    for row, i in zip(copied, rows, strict=True):
        samplers[i].change(row)
    penalise(copied, [samplers[i].counted for i in rows])
    return copied


def _parts(rows: Sequence[int], logits: Tensor) -> Iterator[Sequence[int]]:
    """Some rows at a time on a CPU, elsewhere all."""
    size = max(1, CACHED // logits.shape[1]) if logits.is_cpu else len(rows)
    return (rows[at : at + size] for at in range(0, len(rows), size or 1))


def _greatest(logits: Float[Tensor, "rows vocabulary"], samplers: Sequence[Sampler]) -> Int[Tensor, " rows"]:
    found = likeliest(logits)
    _without_peak(logits.gather(1, found[:, None]), samplers)
    return found


def _drawn(logits: Float[Tensor, "rows vocabulary"], samplers: Sequence[Sampler]) -> Int[Tensor, " rows"]:
    """One token a row, by its probability after temperature and cuts; uses up the logits."""
    samplings = [s.sampling for s in samplers]
    temperature = column([s.temperature for s in samplings], logits)
    peaks = logits.amax(-1, keepdim=True)
    for row in _without_peak(peaks, samplers):
        logits[row] = peaks[row] = 0
    weights = logits.sub_(peaks).div_(temperature).exp_()
    shares = column([s.uniform() for s in samplers], logits, torch.float64)
    return at_share(cut(weights, samplings), shares)


def _without_peak(peaks: Float[Tensor, "rows 1"], samplers: Sequence[Sampler]) -> list[int]:
    """The rows whose greatest logit is no number, if only because their form lets nothing through: these requests fail alone."""
    if peaks.isfinite().all():
        return []
    found: list[int] = (~peaks.isfinite()).flatten().nonzero().flatten().tolist()
    for sampler in (samplers[row] for row in found):
        if sampler.error is None:
            sampler.failed = "the model's logits are not finite numbers"
    return found


def _logprobs(logits: Tensor, tokens: Mapping[int, int], samplers: Mapping[int, Sampler]) -> dict[int, TokenLogprobs]:
    """What the model itself gives to the tokens chosen and to the likeliest, of the rows that ask for it."""
    counts = {i: s.sampling.logprobs for i, s in samplers.items() if s.sampling.logprobs is not None}
    if not counts:
        return {}
    rows = torch.tensor(list(counts), device=logits.device)
    every = logits[rows].float().log_softmax(-1)
    chosen = every.gather(1, column([tokens[i] for i in counts], every, torch.int64)).flatten().tolist()
    values, ids = every.topk(min(max(counts.values()), every.shape[1]))
    pairs = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return {
        row: TokenLogprobs(tokens[row], logprob, likeliest[: counts[row]])
        for row, logprob, likeliest in zip(counts, chosen, pairs, strict=True)
    }
