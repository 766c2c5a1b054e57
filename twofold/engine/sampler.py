"""The choice of the next token from logits.

A token is drawn by one uniform number u of its request's own generator, which lives on the CPU whatever the logits'
device is: the first token at which the cumulative probability, in the order of the vocabulary, passes u. A row's result
is made of its own numbers alone, each added up in an order that the size of the batch does not change.

Cuts (top_k, top_p, min_p) are limits on a token's weight, which is its probability over that of the likeliest. So no
more of the vocabulary is sorted than holds the limit. `argmax` and `cumsum` are slow on CPUs where `amax` and `sum` are
fast: rows are therefore searched by blocks first, then within the block found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.engine.request import Request, Sampling, TokenLogprobs

BLOCK = 256
HEAD = 512
"""So many of the likeliest tokens are sorted first to find where top_p cuts; eight times as many if that was not enough."""


class Choice(NamedTuple):
    """A token, and its log-probabilities if the request asked for them."""

    token: int
    logprobs: TokenLogprobs | None


class Sampler:
    """One request's state: its random stream, the tokens that its penalties count, and where it is in its grammar."""

    def __init__(self, request: Request) -> None:
        self.request, self.sampling = request, request.sampling
        self.matcher = request.grammar.matcher() if request.grammar else None
        self._generator = torch.Generator().manual_seed(self.sampling.seed)
        self._made = torch.empty(0)  # how often the answer has each token; sized when the first logits come
        self._seen = torch.empty(0)  # which tokens prompt and answer have

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete, so that nothing but a stop id can follow."""
        return self.matcher is not None and self.matcher.complete

    @property
    def error(self) -> str | None:
        """Why this request cannot go on, if so; its neighbours can."""
        return self.matcher.error if self.matcher else None

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
        """Apply grammar, bias and penalties, in place."""
        s = self.sampling
        if self.matcher:
            logits.masked_fill_(~self.matcher.allowed(len(logits)).to(logits.device), -torch.inf)
        if s.logit_bias:
            tokens = torch.tensor(list(s.logit_bias), device=logits.device)
            logits[tokens] += torch.tensor(list(s.logit_bias.values()), device=logits.device)
        if self.counts:
            self._count_prompt(logits)
            divided = torch.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
            logits.copy_(torch.where(self._seen, divided, logits))
            logits.sub_(self._made, alpha=s.frequency_penalty).sub_(self._made.sign(), alpha=s.presence_penalty)

    def uniform(self) -> float:
        """The next number of its random stream, at least 0 and below 1."""
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def take(self, token: int) -> None:
        """Take in the token that was chosen."""
        if self.counts:
            self._made[token] += 1
            self._seen[token] = True
        if self.matcher:
            self.matcher.take(token)

    def _count_prompt(self, logits: Float[Tensor, " vocabulary"]) -> None:
        if len(self._made) == len(logits):
            return
        self._made = torch.zeros_like(logits)
        self._seen = torch.zeros_like(logits, dtype=torch.bool)
        self._seen[torch.tensor(self.request.token_ids, device=logits.device)] = True


@torch.inference_mode()
def choose(logits: Float[Tensor, "streams vocabulary"], samplers: Sequence[Sampler | None]) -> list[Choice | None]:
    """The next token of every stream, none where no sampler waits for it; each sampler takes its token in."""
    waiting = {i: s for i, s in enumerate(samplers) if s is not None}
    tokens = _plain(logits, waiting)
    for pick, greedy in ((_likeliest_of, True), (_drawn, False)):
        rows = [i for i, s in waiting.items() if not s.plain and s.sampling.greedy == greedy]
        if rows:
            tokens |= zip(rows, pick(_changed(logits, rows, waiting), [waiting[i] for i in rows]).tolist(), strict=True)
    found = _logprobs(logits, tokens, waiting)
    for i, sampler in waiting.items():
        sampler.take(tokens[i])
    return [Choice(tokens[i], found.get(i)) if i in waiting else None for i in range(len(samplers))]


def _plain(logits: Tensor, samplers: Mapping[int, Sampler]) -> dict[int, int]:
    """The likeliest token of the rows that want no more: for the whole batch at once, and uncopied."""
    rows = [i for i, s in samplers.items() if s.plain]
    found = likeliest(logits).tolist() if rows else []
    return {i: found[i] for i in rows}


def _changed(logits: Tensor, rows: Sequence[int], samplers: Mapping[int, Sampler]) -> Float[Tensor, "rows vocabulary"]:
    """A copy of these rows in float32, as their requests change them."""
    copied = logits[torch.tensor(rows, device=logits.device)].float()
    for row, i in zip(copied, rows, strict=True):
        samplers[i].change(row)
    return copied


def _likeliest_of(logits: Tensor, _: Sequence[Sampler]) -> Int[Tensor, " rows"]:
    return likeliest(logits)


def _logprobs(logits: Tensor, tokens: Mapping[int, int], samplers: Mapping[int, Sampler]) -> dict[int, TokenLogprobs]:
    """What the model itself gives to the tokens chosen and to the likeliest, of the rows that ask for it."""
    counts = {i: s.sampling.logprobs for i, s in samplers.items() if s.sampling.logprobs is not None}
    if not counts:
        return {}
    rows = torch.tensor(list(counts), device=logits.device)
    every = logits[rows].float().log_softmax(-1)
    chosen = every.gather(1, _column([tokens[i] for i in counts], every, torch.int64)).flatten().tolist()
    values, ids = every.topk(min(max(counts.values()), every.shape[1]))
    pairs = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return {
        row: TokenLogprobs(tokens[row], logprob, likeliest[: counts[row]])
        for row, logprob, likeliest in zip(counts, chosen, pairs, strict=True)
    }


# ---------------------------------------------------------------------------------------------- tensors


def likeliest(logits: Float[Tensor, "rows vocabulary"]) -> Int[Tensor, " rows"]:
    """The first token with the greatest logit."""
    block = _by_block(logits, lambda x: x.amax(-1)).argmax(-1, keepdim=True)
    return (block * BLOCK + _block(logits, block, -torch.inf).argmax(-1, keepdim=True)).flatten()


def _drawn(logits: Float[Tensor, "rows vocabulary"], samplers: Sequence[Sampler]) -> Int[Tensor, " rows"]:
    """One token a row, by its probability after temperature and cuts; uses up the logits."""
    samplings = [s.sampling for s in samplers]
    temperature = _column([s.temperature for s in samplings], logits)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature).exp_()
    cut(weights, samplings)
    return at_share(weights, _column([s.uniform() for s in samplers], logits, torch.float64))


def at_share(weights: Float[Tensor, "rows vocabulary"], share: Float[Tensor, "rows 1"]) -> Int[Tensor, " rows"]:
    """The first token at which the sum of the weights up to it passes this share (0 to 1) of them all."""
    sums = _sums(weights)
    upto = sums.cumsum(-1)
    wanted = share * upto[:, -1:]
    block = _first_above(upto, wanted)
    rest = (wanted - (upto - sums).gather(1, block)).clamp_min(0)
    within = _first_above(_block(weights, block, 0.0).double().cumsum(-1), rest)
    return (block * BLOCK + within).flatten().clamp_max(weights.shape[1] - 1)


def _first_above(upto: Float[Tensor, "rows n"], wanted: Float[Tensor, "rows 1"]) -> Int[Tensor, "rows 1"]:
    """The first place where a rising row is above what is wanted, which rounding may put at its very end."""
    below_end = torch.nextafter(upto[:, -1:], torch.zeros_like(wanted))
    return torch.searchsorted(upto, torch.minimum(wanted, below_end), right=True).clamp_max(upto.shape[1] - 1)


def cut(weights: Float[Tensor, "rows vocabulary"], samplings: Sequence[Sampling]) -> None:
    """Set to 0, in place, what min_p, then top_k, then top_p leave out; the greatest weight of a row is 1."""
    size = weights.shape[1]
    if any(s.min_p for s in samplings):
        weights.masked_fill_(weights < _column([s.min_p for s in samplings], weights), 0)
    most = [min(s.top_k or size, size) for s in samplings]
    if limits := [k for k in most if k < size]:
        head = weights.topk(max(limits)).values
        places = _column([min(k, max(limits)) - 1 for k in most], weights, torch.int64)
        limited = _column([k < size for k in most], weights, torch.bool)
        weights.masked_fill_(limited & (weights < head.gather(1, places)), 0)
    rows = [i for i, s in enumerate(samplings) if s.top_p < 1]
    if rows:
        at = torch.tensor(rows, device=weights.device)
        top_p = _column([samplings[i].top_p for i in rows], weights, torch.float64)
        weights[at] = _nucleus(weights[at], top_p, min(HEAD, max(most[i] for i in rows)))


def _nucleus(
    weights: Float[Tensor, "rows vocabulary"], top_p: Float[Tensor, "rows 1"], size: int
) -> Float[Tensor, "rows vocabulary"]:
    """The weights of the fewest tokens that together have top_p of all, 0 for the others (arXiv 1904.09751).

    Of equal weights the first in the vocabulary are kept. `size` of the greatest are sorted, and more where top_p is not
    reached by them.
    """
    wanted = top_p * _sums(weights).sum(-1, keepdim=True)
    head = weights.topk(min(size, weights.shape[1])).values
    upto = head.cumsum(-1, dtype=torch.float64)
    kept = upto - head < wanted
    least = head.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    equal = weights == least
    room = (kept & (head == least)).sum(-1, keepdim=True)
    found = weights.masked_fill(weights < least, 0)
    if (equal.sum(-1, keepdim=True) > room).any():
        found.masked_fill_(equal & (equal.cumsum(-1) > room), 0)
    short = (upto[:, -1:] < wanted).flatten() if size < weights.shape[1] else None
    if short is not None and short.any():
        found[short] = _nucleus(weights[short], top_p[short], 8 * size)
    return found


def _sums(weights: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows blocks"]:
    """The sum of each block, in float64."""
    return _by_block(weights, lambda x: x.sum(-1, dtype=torch.float64))


def _by_block(values: Float[Tensor, "rows n"], reduce: Callable[[Tensor], Tensor]) -> Float[Tensor, "rows blocks"]:
    """What `reduce` makes of each block of a row; the last may be shorter."""
    blocks = values.shape[1] // BLOCK
    whole = reduce(values[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)))
    if blocks * BLOCK == values.shape[1]:
        return whole
    return torch.cat([whole, reduce(values[:, None, blocks * BLOCK :])], dim=1)


def _block(values: Float[Tensor, "rows n"], block: Int[Tensor, "rows 1"], beyond: float) -> Float[Tensor, "rows size"]:
    """One block of each row; `beyond` stands where the row has ended."""
    places = block * BLOCK + torch.arange(BLOCK, device=values.device)
    inside = places < values.shape[1]
    return values.gather(1, places.clamp_max(values.shape[1] - 1)).masked_fill(~inside, beyond)


def _column(values: Sequence[float | int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """One value a row, (rows, 1), on the device of `like` and, if no other is given, of its type."""
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]
