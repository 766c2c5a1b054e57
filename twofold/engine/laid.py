"""A decoder's weights as our own kernels read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from twofold.native.kernels import MEMBERS
from twofold.native.packed import Packed


class Place(NamedTuple):
    """The projections of one place side by side."""

    weight: Packed
    bias: Tensor | None
    widths: NDArray[np.int64]


class Laid(NamedTuple):
    """All weights of a decoder.

    Attributes:
        layers: LAYER, whose addresses lie in `places`.
    """

    places: list[Place]
    layers: NDArray[Any]

    @classmethod
    def of(cls, places: list[Place], like: NDArray[Any]) -> Laid:
        """Layers with these weights, and all else as in others."""
        layers = like.copy()
        for i, layer in enumerate(layers):
            for name, place in zip(("qkv", "o", "gate_up", "down"), places[4 * i : 4 * i + 4], strict=True):
                layer[name] = _addresses(place)
        return cls(places, layers)


def _addresses(place: Place) -> tuple[Any, ...]:
    weight = place.weight
    scale, bias = (0 if t is None else t.data_ptr() for t in (weight.scale, place.bias))
    widths = np.pad(place.widths, (0, MEMBERS - len(place.widths)))
    return weight.address, scale, bias, weight.in_, weight.out, len(place.widths), widths
