"""A token from weights: the likeliest, or the one at a share of them all; and the cuts of top_k, top_p and min_p.

A token is drawn by one uniform number u, its share: the first token at which the sum of the weights, in the order of the
vocabulary, passes u of the whole. A token's weight is its probability over that of the likeliest, so that every cut is a
limit on weights. On a CPU, `argmax`, `cumsum` and above all `sort` of a whole vocabulary are slow where `amax`, `sum` and
`bincount` are fast. So rows are searched by blocks, then within the block found; and a limit is looked for by bins, then
among the tokens of the bin found: the bits of a float that is not negative rise with its value, and the first few of them
are its bin. Our own kernels do the latter for all rows in one call, where they can be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.engine.request import Sampling
from twofold.native.build import NotBuilt
from twofold.native.draw import cut_in_place

BLOCK = 256
BIN = 17
"""Bits of a float32 that do not tell bins apart: 64 bins for each factor of two between weights."""
BINS = (0x3F800000 >> BIN) + 1  # up to that of 1.0, whose bits these are


def likeliest(logits: Float[Tensor, "rows vocabulary"]) -> Int[Tensor, " rows"]:
    """The first token with the greatest logit."""
    block = _by_block(logits, lambda x: x.amax(-1)).argmax(-1, keepdim=True)
    return (block * BLOCK + _block(logits, block, -torch.inf).argmax(-1, keepdim=True)).flatten()


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


# ---------------------------------------------------------------------------------------------- cuts


def cut(weights: Float[Tensor, "rows vocabulary"], samplings: Sequence[Sampling]) -> Float[Tensor, "rows vocabulary"]:
    """The weights, 0 where min_p, then top_k, then top_p (arXiv 1904.09751) leave a token out; may use up those given.

    The greatest weight of a row is 1. top_k keeps all tokens as likely as its last; top_p the fewest that have their part
    of what is left, and of equally likely ones the first in the vocabulary.
    """
    if any(s.min_p for s in samplings):
        weights.masked_fill_(weights < column([s.min_p for s in samplings], weights), 0)
    if not any(s.top_k or s.top_p < 1 for s in samplings):
        return weights
    if not weights.is_cpu:
        return cut_by_sorting(weights, samplings)
    try:
        cut_in_place(weights, [min(s.top_k, weights.shape[1]) for s in samplings], [s.top_p for s in samplings])
    except NotBuilt:
        cut_by_bins(weights, samplings)
    return weights


def cut_by_bins(weights: Float[Tensor, "rows vocabulary"], samplings: Sequence[Sampling]) -> None:
    """top_k and top_p row by row, in place: for CPUs."""
    for row, sampling in zip(weights, samplings, strict=True):
        _cut_by_bins(row, sampling)


def cut_by_sorting(
    weights: Float[Tensor, "rows vocabulary"], samplings: Sequence[Sampling]
) -> Float[Tensor, "rows vocabulary"]:
    """top_k and top_p of all rows at once, without waiting for the device: for GPUs, which sort fast."""
    size = weights.shape[1]
    last = column([min(s.top_k or size, size) - 1 for s in samplings], weights, torch.int64)
    part = column([s.top_p if s.top_p < 1 else 2.0 for s in samplings], weights, torch.float64)
    head = weights.sort(descending=True).values
    head = head.masked_fill(head < head.gather(1, last), 0)
    upto = head.cumsum(-1, dtype=torch.float64)
    kept = (upto - head < part * upto[:, -1:]) & (head > 0)
    least = head.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    room = (kept & (head == least)).sum(-1, keepdim=True)
    equal = weights == least
    return weights.masked_fill(~((weights > least) | (equal & (equal.cumsum(-1) <= room))), 0)


def _cut_by_bins(row: Float[Tensor, " vocabulary"], sampling: Sampling) -> None:
    """top_k and top_p of one row, in place."""
    if 0 < sampling.top_k < len(row):
        kept = _kept(row, None, (sampling.top_k - 0.5) / len(row))
        _drop_below(row, kept[-1])
    if sampling.top_p < 1:
        kept = _kept(row, row.double(), sampling.top_p)
        _drop_below(row, kept[-1])
        equal = (row == kept[-1]).nonzero().flatten()
        row[equal[int((kept == kept[-1]).sum()) :]] = 0


def _kept(row: Float[Tensor, " vocabulary"], amounts: Tensor | None, part: float) -> Float[Tensor, " some"]:
    """The fewest of the greatest weights whose amounts (1 each if not given) reach this part of all: those of them, in
    falling order, that lie in the last bin."""
    bins = row.view(torch.int32) >> BIN
    upto = torch.bincount(bins, amounts, BINS).flip(0).cumsum(0).double()
    wanted = upto[-1] * part
    place = int(torch.searchsorted(upto, wanted))
    inside = row[bins == BINS - 1 - place].sort(descending=True).values
    each = torch.ones_like(inside, dtype=torch.float64) if amounts is None else inside.double()
    before = upto[place - 1] if place else torch.zeros_like(wanted)
    return inside[before + (each.cumsum(0) - each) < wanted]


def _drop_below(row: Float[Tensor, " vocabulary"], least: Float[Tensor, ""]) -> None:
    torch.threshold_(row, torch.nextafter(least, torch.zeros_like(least)).item(), 0.0)


# ---------------------------------------------------------------------------------------------- blocks


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


def column(values: Sequence[float | int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """One value a row, (rows, 1), on the device of `like` and, if no other is given, of its type."""
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]
