"""A weight W and its update beside each other: how large both are, and how much louder than W the update is where it acts.

*Amplification* (arXiv 2106.09685, section 7.3) is ‖delta‖_F / ‖Uᵀ W V‖_F with U, V the update's own singular directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.lowrank.algebra import Bases

COLUMNS = 16
"""Of a block: torch multiplies a large matrix with sixteen columns many times faster than with ten."""
PIECE = 1 << 21
"""Values of W that are looked at at once: few enough for a cache, and enough that what comes after each costs little."""
SUMMED_ROWS, NARROW = 128, 32
"""Rows of W that its transpose's product with a narrow block sums at once in float32: half the time of all rows in one product."""


@dataclass(frozen=True)
class Weight:
    """W as it is multiplied: some rows at a time, which stay in a cache in the type in which they are multiplied.

    Attributes:
        stored: (out, in), in the type in which it is kept; a view will do.
        dtype: in which products are made; they are summed in float32.
    """

    stored: Float[Tensor, "out in_"]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        out, in_ = self.stored.shape
        return out, in_

    def pieces(self) -> Iterator[Tensor]:
        """All rows in order, some at a time; each holds only until the next."""
        pieces = self.beside(self.stored)
        room = None if self.stored.dtype == self.dtype else torch.empty_like(pieces[0], dtype=self.dtype)
        for rows in pieces:
            yield rows if room is None else room[: len(rows)].copy_(rows)

    def beside(self, matrix: Float[Tensor, "out n"]) -> tuple[Tensor, ...]:
        """The rows of a matrix that lie beside the pieces."""
        groups = max(1, PIECE // (self.shape[1] * SUMMED_ROWS))
        return torch.split(matrix, groups * SUMMED_ROWS)

    def times(self, block: Float[Tensor, "in_ n"]) -> Float[Tensor, "out n"]:
        """W times a block, as float32."""
        return torch.cat([_times(rows, block) for rows in self.pieces()])

    def times_transposed(self, block: Float[Tensor, "out n"]) -> Float[Tensor, "in_ n"]:
        """Wᵀ times a block, as float32."""
        back = block.new_zeros(block.shape[1], self.shape[1], dtype=torch.float32)
        for rows, beside in zip(self.pieces(), self.beside(block), strict=True):
            back += _crossed(beside, rows)
        return back.T


class Sizes(NamedTuple):
    """Of a weight and its update.

    Attributes:
        frobenius_norm, spectral_norm: of W; the former to 1e-4, the latter from below, by a few per cent at most.
        amplification: infinite where W does nothing in the update's directions, zero for a zero update.
    """

    frobenius_norm: float
    spectral_norm: float
    amplification: float


def sizes(weight: Weight, update: Bases, spectral_norm: float | None = None) -> Sizes:
    """In two readings of W.

    Args:
        spectral_norm: of W, where it is known: then W is read once.
    """
    start = random_block(weight)
    square = torch.zeros((), dtype=torch.float64, device=start.device)
    back = start.new_zeros(start.shape[1] + update.out.shape[1], weight.shape[1])
    for rows, own in zip(weight.pieces(), weight.beside(update.out.float()), strict=True):
        square += _square(rows.float())
        back += _crossed(torch.cat([_times(rows, start), own], 1), rows)
    reached, seen = back[: start.shape[1]].T, back[start.shape[1] :]
    norm = _largest_image(weight, torch.linalg.qr(reached).Q) if spectral_norm is None else spectral_norm
    amplified = _ratio(float(update.values.norm()), float((seen @ update.in_.float()).norm()))
    return Sizes(math.sqrt(float(square)), norm, amplified)


def random_block(weight: Weight, columns: int = COLUMNS) -> Float[Tensor, "in_ n"]:
    """The same for all weights of a width."""
    drawn = torch.randn(weight.shape[1], columns, generator=torch.Generator().manual_seed(0))
    return drawn.to(weight.stored.device)


def _largest_image(weight: Weight, space: Float[Tensor, "in_ n"]) -> float:
    """The spectral norm of W in a space; in that of WᵀW x for random x, it is W's by a few per cent."""
    images = weight.times(space)
    return math.sqrt(float(torch.linalg.eigvalsh(images.T @ images)[-1].clamp_min(0)))


def _ratio(delta: float, own: float) -> float:
    return delta / own if own else math.inf if delta else 0.0


def _square(rows: Float[Tensor, "n in_"]) -> Tensor:
    """The sum of the squares, in a third of the time that squares and then their sum take."""
    flat = rows.flatten()
    return flat.dot(flat)


def _times(rows: Float[Tensor, "m in_"], block: Float[Tensor, "in_ n"]) -> Float[Tensor, "m n"]:
    return (rows @ block.to(rows)).float()


def _crossed(block: Float[Tensor, "m n"], rows: Float[Tensor, "m in_"]) -> Float[Tensor, "n in_"]:
    """blockᵀ rows."""
    left = block.to(rows)
    if rows.dtype is not torch.float32 or left.shape[1] > NARROW:
        return (left.T @ rows).float()
    count = len(rows) // SUMMED_ROWS
    whole = count * SUMMED_ROWS
    beside, groups = (part[:whole].unflatten(0, (count, SUMMED_ROWS)) for part in (left, rows))
    return left[whole:].T @ rows[whole:] + torch.bmm(beside.mT, groups).sum(0)
