"""The cuts of top_k and top_p over whole vocabularies, by our own kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from twofold.native.build import library

_A, _I = ctypes.c_void_p, ctypes.c_int64


def cut_in_place(weights: Float[Tensor, "rows vocabulary"], top_k: Sequence[int], top_p: Sequence[float]) -> None:
    """top_k, then top_p of each row, as `engine/draw.py` has them: weights from 0 to 1 in float32, in one piece.

    Raises:
        NotBuilt: there are no compiled kernels here.
    """
    call = library().cut
    counts, parts = np.array(top_k, np.int64), np.array(top_p, np.float64)
    rows, size = weights.shape
    call(_A(weights.data_ptr()), _I(rows), _I(size), _A(counts.ctypes.data), _A(parts.ctypes.data))
