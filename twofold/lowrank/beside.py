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
from twofold.lowrank.products import Term, crossed, sum_of_products

COLUMNS = 16
"""Of a block: torch multiplies a large matrix with sixteen columns many times faster than with ten."""
PIECE = 1 << 22
"""Values of W that are multiplied at once: few enough for a cache, and enough that what comes after each costs little."""
SQUARED = 1 << 18
"""Of these, so many are squared at once."""


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
        return torch.split(matrix, max(1, PIECE // self.shape[1]))

    def times(self, block: Float[Tensor, "in_ n"]) -> Float[Tensor, "out n"]:
        """W times a block, as float32."""
        return torch.cat([_times(rows, block) for rows in self.pieces()])

    def times_transposed(self, block: Float[Tensor, "out n"]) -> Float[Tensor, "in_ n"]:
        """Wᵀ times a block, as float32."""
        back = block.new_zeros(block.shape[1], self.shape[1], dtype=torch.float32)
        for rows, beside in zip(self.pieces(), self.beside(block), strict=True):
            back += _crossed(beside, rows)
        return back.T

    def there_and_back(
        self, block: Float[Tensor, "in_ n"], added: Float[Tensor, "out n"]
    ) -> tuple[Float[Tensor, "out n"], Float[Tensor, "in_ n"]]:
        """W times a block and what is added to that, and Wᵀ times the sum; W is read once."""
        images = torch.empty_like(added, dtype=torch.float32)
        back = images.new_zeros(block.shape[1], self.shape[1])
        for rows, image, more in zip(self.pieces(), self.beside(images), self.beside(added), strict=True):
            torch.add(_times(rows, block), more, out=image)
            back += _crossed(image, rows)
        return images, back.T


class Sizes(NamedTuple):
    """Of a weight and its update.

    Attributes:
        frobenius_norm, spectral_norm: of W; the former to 1e-4, the latter from below, by a few per cent where the values of W fall
            off, by an eighth where they do not.
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
    columns = update.in_.float()
    if spectral_norm is None:
        start = random_block(weight)
        _, reached = weight.there_and_back(start, start.new_zeros(weight.shape[0], start.shape[1]))
        columns = torch.cat([torch.linalg.qr(reached).Q, columns], 1)
    square, images = torch.zeros((), dtype=torch.float64, device=columns.device), []
    for rows in weight.pieces():
        square += _square(rows)
        images.append(_times(rows, columns))
    others, own = torch.cat(images).split([columns.shape[1] - update.in_.shape[1], update.in_.shape[1]], 1)
    norm = _largest(others) if spectral_norm is None else spectral_norm
    amplified = _ratio(float(update.values.norm()), float((update.out.float().T @ own).norm()))
    return Sizes(math.sqrt(float(square)), norm, amplified)


def random_block(weight: Weight) -> Float[Tensor, "in_ n"]:
    """The same for all weights of a width."""
    drawn = torch.randn(weight.shape[1], COLUMNS, generator=torch.Generator().manual_seed(0))
    return drawn.to(weight.stored.device)


def _largest(images: Float[Tensor, "out n"]) -> float:
    """The spectral norm of W in a space, by what it makes of a basis: near W's in that of WᵀW x for random x."""
    return math.sqrt(float(torch.linalg.eigvalsh(images.T @ images)[-1].clamp_min(0)))


def _ratio(delta: float, own: float) -> float:
    return delta / own if own else math.inf if delta else 0.0


def _square(rows: Float[Tensor, "n in_"]) -> Tensor:
    """The sum of the squares, of so many at a time that they stay in a cache when they are widened."""
    parts = (part.float() for part in rows.flatten().split(SQUARED))
    return torch.stack([part.dot(part) for part in parts]).double().sum()


def _times(rows: Float[Tensor, "m in_"], block: Float[Tensor, "in_ n"]) -> Float[Tensor, "m n"]:
    return sum_of_products([Term(rows, block.to(rows).contiguous(), as_read=True)]).float()


def _crossed(block: Float[Tensor, "m n"], rows: Float[Tensor, "m in_"]) -> Float[Tensor, "n in_"]:
    """blockᵀ rows."""
    return crossed(block.to(rows).contiguous(), rows).float()
