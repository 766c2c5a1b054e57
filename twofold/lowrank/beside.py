"""A weight W and its update beside each other: how large both are, and how much louder than W the update is where it acts.

*Amplification* (arXiv 2106.09685, section 7.3) is ‖delta‖_F / ‖Uᵀ W V‖_F with U, V the update's own singular directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.lowrank.algebra import Bases

COLUMNS = 16
"""Of a block: torch multiplies a large matrix with sixteen columns many times faster than with ten."""

PIECE = 1 << 21
"""Values of W that are looked at at once: few enough for a cache, and enough that summing over the pieces costs little."""


class Sizes(NamedTuple):
    """Of a weight and its update.

    Attributes:
        frobenius_norm, spectral_norm: of W; the former to 1e-4, the latter from below, by a few per cent at most.
        amplification: infinite where W does nothing in the update's directions, zero for a zero update.
    """

    frobenius_norm: float
    spectral_norm: float
    amplification: float


def sizes(
    weight: Float[Tensor, "out in_"], update: Bases, dtype: torch.dtype, spectral_norm: float | None = None
) -> Sizes:
    """In two readings of W, some rows at a time: these stay in a core's cache in the type in which they are multiplied.

    Args:
        dtype: in which products are made; they are summed in float32.
        spectral_norm: of W, where it is known: then W is read once.
    """
    start = torch.randn(weight.shape[1], COLUMNS, generator=torch.Generator().manual_seed(0)).to(weight.device)
    square = torch.zeros((), dtype=torch.float64, device=weight.device)
    back = start.new_zeros(COLUMNS + update.out.shape[1], weight.shape[1])
    for rows, own in zip(_in_pieces(weight, dtype), _split(update.out.float(), weight), strict=True):
        square += _square(rows.float())
        back += times_transposed(rows, torch.cat([times(rows, start), own], 1)).T
    reached, seen = back[:COLUMNS].T, back[COLUMNS:]
    norm = _largest_image(weight, torch.linalg.qr(reached).Q, dtype) if spectral_norm is None else spectral_norm
    amplified = _ratio(float(update.values.norm()), float((seen @ update.in_.float()).norm()))
    return Sizes(math.sqrt(float(square)), norm, amplified)


def _square(rows: Float[Tensor, "n in_"]) -> Tensor:
    """The sum of the squares, in a third of the time that squares and then their sum take."""
    flat = rows.flatten()
    return flat.dot(flat)


def _largest_image(weight: Tensor, space: Float[Tensor, "in_ n"], dtype: torch.dtype) -> float:
    """The spectral norm of W in a space; in that of WᵀW x for random x, it is W's by a few per cent."""
    gram = space.new_zeros(space.shape[1], space.shape[1])
    for rows in _in_pieces(weight, dtype):
        images = times(rows, space)
        gram += images.T @ images
    return math.sqrt(float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0)))


def _ratio(delta: float, own: float) -> float:
    return delta / own if own else math.inf if delta else 0.0


def _in_pieces(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Some rows of W at a time, converted into one place in memory."""
    pieces = _split(weight, weight)
    room = None if weight.dtype == dtype else torch.empty_like(pieces[0], dtype=dtype)
    for rows in pieces:
        yield rows if room is None else room[: len(rows)].copy_(rows)


def _split(matrix: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The rows of a matrix that lie beside the pieces of W."""
    return torch.split(matrix, max(1, PIECE // weight.shape[1]))


def times(weight: Float[Tensor, "out in_"], block: Float[Tensor, "in_ n"]) -> Float[Tensor, "out n"]:
    """W times a block, in W's type, as float32."""
    return (weight @ block.to(weight)).float()


def times_transposed(weight: Float[Tensor, "out in_"], block: Float[Tensor, "out n"]) -> Float[Tensor, "in_ n"]:
    """Wᵀ times a block: half the time of the same with a transposed view of W."""
    return (block.T.to(weight) @ weight).T.float()
