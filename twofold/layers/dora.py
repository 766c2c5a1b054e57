"""DoRA over a layer whose weight can be seen as a matrix: an adapter sets the lengths of that matrix's rows itself."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from twofold.layers.protocol import Share
from twofold.layers.weights import WeightLayer
from twofold.lowrank.dora import row_norms, row_squares
from twofold.lowrank.factors import LowRank


class MatrixShare(Share):
    """A share with one update of the matrix, and with DoRA the lengths of its rows.

    Attributes:
        magnitude: those lengths, of as many values as there are rows; None without DoRA.
    """

    magnitude: nn.Parameter | None

    def low_rank(self) -> LowRank:
        """Its update, at the weight it is active with."""
        raise NotImplementedError


class DoraLayer(WeightLayer):
    """A layer that knows its weight as a matrix (out, in) whose rows DoRA's magnitudes are of.

    Attributes:
        squares: ||W0||² of each row, once an adapter asked for it.
    """

    squares: Tensor | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self._buffers["squares"] = None
        self._non_persistent_buffers_set.add("squares")

    def matrix(self) -> Float[Tensor, "out in_"]:
        """The base weight as (out, in), a view."""
        raise NotImplementedError

    def row_norms(self, share: MatrixShare) -> Float[Tensor, " out"]:
        """||W0 + scale·BA|| of each row, a constant to the gradient."""
        if self.squares is None:
            self.squares = row_squares(self.matrix())
        return row_norms(self.matrix(), self.squares, share.low_rank())

    def stretch(self, shares: Sequence[MatrixShare]) -> Float[Tensor, " out"] | None:
        """DoRA's factor of each row; such an adapter is active alone, at weight 1."""
        magnitude = shares[0].magnitude if len(shares) == 1 else None
        return None if magnitude is None else magnitude.flatten() / self.row_norms(shares[0])
