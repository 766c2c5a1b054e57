"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of transformers' Llama."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.functional.fusing import fusible


class Angles(NamedTuple):
    """Cosines and sines of each row's angles, both halves written out, the first half of the sines negated."""

    cos: Float[Tensor, "rows 1 turned"]
    sin: Float[Tensor, "rows 1 turned"]

    @classmethod
    def of(cls, cos: Float[Tensor, "rows turned"], sin: Float[Tensor, "rows turned"]) -> Angles:
        """From the tables that transformers' rotary modules give."""
        half = sin.shape[-1] // 2
        return cls(cos[:, None], torch.cat((-sin[:, :half], sin[:, half:]), -1)[:, None])

    def back(self) -> Angles:
        """The turn that undoes this one; the gradient of a turn."""
        return Angles(self.cos, -self.sin)


@fusible
def rotate(x: Float[Tensor, "rows heads d"], angles: Angles) -> Float[Tensor, "rows heads d"]:
    """Turn each pair (x_i, x_{i + turned/2}) by its row's angles; values behind the turned ones stay as they are."""
    turned = angles.cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], angles), x[..., turned:]), -1)
    return (x * angles.cos).addcmul_(x.roll(turned // 2, -1), angles.sin)
