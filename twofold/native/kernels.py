"""Typed doors to the compiled kernels: tensors in, tensors out, on the CPU, in float32 or bfloat16.

Each has a counterpart in `functional/` or `lowrank/` that does the same with PyTorch's operations, and is tested against it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from twofold.functional.attention import Scoring
from twofold.functional.norm import Norm
from twofold.functional.rope import Angles
from twofold.native.build import library
from twofold.native.packed import DTYPES, Packed

MEMBERS = 3
"""Projections that may lie side by side in one product."""
SEGMENT = np.dtype([("ranks", "<i8"), ("a", "<u8"), ("b", "<u8", MEMBERS), ("scale", "<f8", MEMBERS)])
"""One adapter's part of a product, as the kernels read it: ranks of one member, addresses of packed factors, 0 for none."""
_P = "<u8"
_NORM = [("weight", _P), ("eps", "<f8")]
_WEIGHT = [
    ("w", _P),
    ("scale", _P),
    ("bias", _P),
    ("in_", "<i8"),
    ("out", "<i8"),
    ("members", "<i8"),
    ("widths", "<i8", MEMBERS),
]
LAYER = np.dtype(
    [(n, _NORM) for n in ("attention", "q", "k", "attention_post", "mlp", "mlp_post")]
    + [(n, _WEIGHT) for n in ("qkv", "o", "gate_up", "down")]
    + [("window", "<i8"), ("cos", _P), ("sin", _P)]
)
"""A decoder layer as the kernels read it: addresses, 0 for what is not there."""
PASS = np.dtype(
    [
        (n, "<i8")
        for n in ("queries", "keys_", "d", "turned", "rows", "few", "capacity", "slots", "activation", "segments")
    ]
    + [("scale", "<f8"), ("softcap", "<f8")]
    + [(n, _P) for n in ("of_slots", "positions", "found", "starts", "of_rows", "weights", "keys", "values")]
)
"""What all layers of one pass share, as the kernels read it."""

_A, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


@dataclass(frozen=True)
class Updates:
    """Which rows of a batch have which adapters: rows in segments, one segment an adapter.

    Attributes:
        starts: where each segment begins in `rows`, and the end.
        rows, weights: the rows of all segments, one after the other, and how much of the adapter each has.
    """

    starts: NDArray[np.int32]
    rows: NDArray[np.int32]
    weights: NDArray[np.float32]


class Kernels:
    """The kernels for one type."""

    def __init__(self, dtype: torch.dtype) -> None:
        name, found = DTYPES[dtype], library()
        self._linear = getattr(found, f"linear_{name}")
        self._linear.argtypes = [_A, _I, _A, _A, _A, _A, _I, _I, _I, _I, _I, _I, _A, _I, _A, _A, _A, _A]
        self._rms_norm = getattr(found, f"rms_norm_{name}")
        self._rms_norm.argtypes = [_A, _A, _F, _I, _I, _A]
        self._rotary = getattr(found, f"rotary_{name}")
        self._rotary.argtypes = [_A, _A, _A, _A, _A, _A, _F, _A, _A, _I, _A, _A, _I]
        self._attention = getattr(found, f"attention_{name}")
        self._attention.argtypes = [_A, _A, _A, _A, _A, _A, _I, _I, _F, _F, _A, _I, _I]
        self._layers = getattr(found, f"layers_{name}")
        self._layers.argtypes = [_A, _I, _A, _A]
        self._gated = getattr(found, f"gated_{name}")
        self._gated.argtypes = [_A, _I, _I, _I, _A]

    def linear(
        self,
        x: Float[Tensor, "rows in_"],
        weight: Packed,
        bias: Float[Tensor, " out"] | None = None,
        onto: Float[Tensor, "rows out"] | None = None,
        updates: tuple[Updates, NDArray[Any], NDArray[np.int64]] | None = None,
    ) -> Float[Tensor, "rows out"]:
        """x Wᵀ + b and what each row's adapters add to it.

        Args:
            onto: what the result is added to, in place.
            updates: the rows' adapters, what each brings here (SEGMENT), and the widths of the members that lie side by side.
        """
        y = x.new_empty(len(x), weight.out) if onto is None else onto
        scale, added = (None if t is None else t.data_ptr() for t in (weight.scale, bias))
        fixed = (
            x.data_ptr(),
            x.stride(0),
            weight.address,
            scale,
            added,
            y.data_ptr(),
            y.stride(0),
            *x.shape,
            weight.out,
        )
        if updates is None:
            self._linear(*fixed, onto is not None, 0, None, 0, None, None, None, None)
            return y
        rows, segments, widths = updates
        of_rows = (rows.starts.ctypes.data, rows.rows.ctypes.data, rows.weights.ctypes.data)
        found = (len(segments), segments.ctypes.data)
        self._linear(*fixed, onto is not None, len(widths), widths.ctypes.data, *found, *of_rows)
        return y

    def rms_norm(self, x: Float[Tensor, "rows d"], norm: Norm) -> Float[Tensor, "rows d"]:
        """As `functional.norm`, rounded once; the norm's weight in float32."""
        y = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), norm.weight.data_ptr(), norm.eps, *x.shape, y.data_ptr())
        return y

    def rotary(
        self,
        qkv: Float[Tensor, "rows width"],
        heads: NDArray[np.int64],
        angles: Angles,
        norms: Sequence[Norm | None],
        at: tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]],
        keys: Float[Tensor, "slots kv_heads capacity d"],
        values: Float[Tensor, "slots kv_heads capacity d"],
    ) -> None:
        """Norm and turn queries and keys where they are, and put keys and values into their slots.

        Args:
            heads: of queries, of keys, values in a head, and how many of them turn.
            angles: in float32.
            norms: of queries and of keys, their weights in float32.
            at: slot and position of each row, in int32.
        """
        q, k = (None if n is None else n.weight.data_ptr() for n in norms)
        eps = next((n.eps for n in norms if n is not None), 0.0)
        turned = (angles.cos.data_ptr(), angles.sin.data_ptr(), q, k, eps, at[0].data_ptr(), at[1].data_ptr())
        cache = (keys.shape[2], keys.data_ptr(), values.data_ptr())
        self._rotary(qkv.data_ptr(), heads.ctypes.data, *turned, *cache, len(qkv))

    def attention(
        self,
        qkv: Float[Tensor, "rows width"],
        heads: NDArray[np.int64],
        at: tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]],
        keys: Float[Tensor, "slots kv_heads capacity d"],
        values: Float[Tensor, "slots kv_heads capacity d"],
        scoring: Scoring,
        window: int | None,
        few: int,
    ) -> Float[Tensor, "rows queries_d"]:
        """Each row's queries over its slot, up to the row's own position and as far back as `window`.

        Args:
            few: rows that are taken one by one; those behind them are parts of prompts, each in its order.
        """
        out = qkv.new_empty(len(qkv), int(heads[0] * heads[2]))
        cache = (keys.data_ptr(), values.data_ptr(), at[0].data_ptr(), at[1].data_ptr(), keys.shape[2], window or 0)
        scaling = (scoring.scale, scoring.softcap or 0.0)
        self._attention(qkv.data_ptr(), heads.ctypes.data, *cache, *scaling, out.data_ptr(), len(qkv), few)
        return out

    def layers(self, found: NDArray[Any], shared: NDArray[Any], x: Float[Tensor, "rows d"]) -> None:
        """All layers one after the other, in place, whose every operation is one of the above.

        Args:
            found: LAYER, one each.
            shared: PASS.
        """
        self._layers(found.ctypes.data, len(found), shared.ctypes.data, x.data_ptr())

    def gated(self, both: Float[Tensor, "rows two_d"], activation: int) -> Float[Tensor, "rows d"]:
        """f(gate) · up of rows that hold both side by side."""
        y = both.new_empty(len(both), both.shape[1] // 2)
        self._gated(both.data_ptr(), activation, *y.shape, y.data_ptr())
        return y


ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
"""The kernels' numbers of the activations that `functional.gated` knows."""
