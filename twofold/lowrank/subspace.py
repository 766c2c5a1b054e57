"""Random maps P from few numbers z (d,) to all values of a model, tensor by tensor, and their transposes.

Intrinsic dimension (arXiv 1804.08838, 2012.13255) trains z in theta = theta_0 + P z. P is never stored as a matrix. Two kinds:
*sparse*, where each value takes one entry of z with a random sign, so that columns are exactly orthogonal and a product costs one
pass over the values; and *Fastfood* (arXiv 1408.3060), P = H G Π H B with the Walsh-Hadamard transform H, random signs B,
a permutation Π and Gaussian G, where each value mixes all of z. In both, columns have length 1 over the D values of the model
(of Fastfood in expectation), so that a step in z is a step of the same length in theta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Kind: TypeAlias = Literal["sparse", "fastfood"]


@runtime_checkable
class Projection(Protocol):
    """One tensor's rows of P."""

    def apply(self, z: Float[Tensor, " d"]) -> Float[Tensor, " size"]:
        """P z."""
        ...

    def transpose(self, g: Float[Tensor, " size"]) -> Float[Tensor, " d"]:
        """Pᵀ g."""
        ...


@dataclass(frozen=True)
class Sparse:
    """One entry of z and one sign for each value: `places` counts in z and, behind it, in -z."""

    places: Tensor
    d: int
    scale: float

    @classmethod
    def draw(cls, size: int, d: int, total: int, seed: int) -> Sparse:
        """
        Args:
            size: values of the tensor.
            total: values of the whole model.
        """
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(2 * d, (size,), generator=generator, dtype=torch.int32 if d < 1 << 30 else torch.int64)
        return cls(places, d, math.sqrt(d / total))

    def apply(self, z: Float[Tensor, " d"]) -> Float[Tensor, " size"]:
        return torch.cat([z, -z]).mul_(self.scale).index_select(0, self.places)

    def transpose(self, g: Float[Tensor, " size"]) -> Float[Tensor, " d"]:
        both = g.new_zeros(2 * self.d).index_add_(0, self.places, g)
        return (both[: self.d] - both[self.d :]).mul_(self.scale)


@dataclass(frozen=True)
class Fastfood:
    """Blocks of a power of two, each with signs, a permutation and Gaussians of its own."""

    signs: Float[Tensor, "blocks length"]
    order: Tensor
    gauss: Float[Tensor, "blocks length"]
    size: int
    d: int
    scale: float

    @classmethod
    def draw(cls, size: int, d: int, total: int, seed: int) -> Fastfood:
        """As `Sparse.draw`."""
        generator = torch.Generator().manual_seed(seed)
        length = 1 << max(0, d - 1).bit_length()
        blocks = -(-size // length)
        signs = torch.randint(2, (blocks, length), generator=generator).mul_(2).sub_(1).float()
        order = torch.stack([torch.randperm(length, generator=generator) for _ in range(blocks)])
        gauss = torch.randn(blocks, length, generator=generator)
        return cls(signs, order, gauss, size, d, 1 / math.sqrt(length * total))

    def apply(self, z: Float[Tensor, " d"]) -> Float[Tensor, " size"]:
        padded = torch.cat([z, z.new_zeros(self.signs.shape[1] - self.d)])
        mixed = walsh_hadamard(padded * self.signs).gather(1, self.order)
        return walsh_hadamard(mixed * self.gauss).flatten()[: self.size] * self.scale

    def transpose(self, g: Float[Tensor, " size"]) -> Float[Tensor, " d"]:
        padded = torch.cat([g, g.new_zeros(self.signs.numel() - self.size)]).view(self.signs.shape)
        mixed = walsh_hadamard(padded) * self.gauss
        back = torch.empty_like(mixed).scatter_(1, self.order, mixed)
        return (walsh_hadamard(back) * self.signs).sum(0)[: self.d] * self.scale


KINDS: dict[Kind, type[Sparse] | type[Fastfood]] = {"sparse": Sparse, "fastfood": Fastfood}


def walsh_hadamard(x: Float[Tensor, "rows length"]) -> Float[Tensor, "rows length"]:
    """Each row times the Walsh-Hadamard matrix of its length, a power of two, unscaled: its own inverse times the length."""
    rows, length = x.shape
    step = 1
    while step < length:
        a, b = x.view(rows, -1, 2, step).unbind(2)
        x = torch.stack([a + b, a - b], 2).view(rows, length)
        step *= 2
    return x
