"""A weight and its update beside each other: how large, how much is amplified, what is new. Nothing is decomposed whole.

*Amplification* (arXiv 2106.09685, section 7.3) is ‖delta‖_F / ‖Uᵀ W V‖_F with U, V the update's own singular directions: how much
louder than in W they are.
An *intruder* (arXiv 2410.21228) is one of the k largest left singular vectors y of W + delta that is like none of W's: max_i
|cos(y, u_i)| < epsilon. The y come from a few block iterations with W x + scale·B(A x). Their cosines need no decomposition of W
either: Lanczos on W Wᵀ started at y gives the weights cos²(y, u_i) as those of a Gauss quadrature, directions of W
whose values lie too close to be told apart counted as one; so a mixture of such neighbours is not called an intruder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.lowrank.algebra import Decomposition
from twofold.lowrank.factors import LowRank

COLUMNS = 16
"""Of a block: torch multiplies a large matrix with sixteen columns many times faster than with ten."""
PASSES, OVERSAMPLED = 8, 4
"""Block iterations for the k largest directions of the changed weight, and columns beyond k at least."""
STEPS = 32
"""Of Lanczos: a direction that is like none of W's spreads over so many nodes, and must not seem to lie in a few."""
ALIKE = 0.5
"""The cosine below which a direction is new: the paper's epsilon."""
NULL = 1e-6
"""Squared singular values below this share of the largest are no directions of W, and what lies there is new."""


class Beside(NamedTuple):
    """The spectral norm of W, and how much louder an update's directions are in it than in W."""

    spectral_norm: float
    amplification: float


def beside(weight: Float[Tensor, "out in_"], found: Decomposition) -> Beside:
    """A weight beside a decomposed update, from three passes over the weight in its own type.

    The spectral norm comes from one block iteration, from below, by a few per cent at most. The amplification is infinite where W
    does nothing in the update's directions, and zero for a zero update.
    """
    real = found.rank
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(weight.shape[1], COLUMNS, generator=generator)
    image = _times(weight, torch.cat([found.V[:, :real].float(), start], 1))
    own = float((found.U[:, :real].float().T @ image[:, :real]).norm())
    back = _times(weight.T, torch.linalg.qr(image[:, real:]).Q)
    largest = torch.linalg.matrix_norm(_times(weight, torch.linalg.qr(back).Q), 2)
    size = float(found.values.norm())
    return Beside(float(largest), 0.0 if not real else size / own if own else float("inf"))


def _times(weight: Tensor, block: Tensor) -> Tensor:
    return (weight @ block.to(weight)).float()


def intruders(weight: Float[Tensor, "out in_"], update: LowRank, k: int) -> list[float]:
    """max_i |cos(y, u_i)| for the k largest left singular vectors y of W + delta, the largest first; below ALIKE are intruders."""
    k = min(k, *weight.shape)
    A, B = update.A.to(weight), update.B.to(weight) * update.scale
    generator = torch.Generator().manual_seed(0)
    columns = min(-(-(k + OVERSAMPLED) // COLUMNS) * COLUMNS, *weight.shape)
    y = torch.randn(len(weight), columns, generator=generator).to(weight)
    for _ in range(PASSES):
        x = torch.linalg.qr(weight.T @ y + A.T @ (B.T @ y)).Q
        y = weight @ x + B @ (A @ x)
    u, _, _ = torch.linalg.svd(y, full_matrices=False)
    return [_largest_cosine(w) for w in _quadratures(weight, u)[:k]]


def _largest_cosine(weights: Tensor) -> float:
    return float(weights.max().clamp(0, 1).sqrt()) if len(weights) else 0.0


def _quadratures(weight: Tensor, starts: Float[Tensor, "out k"]) -> list[Tensor]:
    """For each start, the weights of the Gauss quadrature of its measure over the spectrum of W Wᵀ.

    The runs go side by side, so that W is read twice a step for all of them.
    """
    k, bases = starts.shape[1], [starts / starts.norm(dim=0)]
    diagonal, beside = [], []
    for step in range(min(STEPS, len(weight))):
        last = bases[-1]
        new = weight @ (weight.T @ last)
        diagonal.append((new * last).sum(0))
        for basis in [*bases, *bases]:  # twice, for float32 loses what once leaves
            new = new - basis * (basis * new).sum(0)
        size = new.norm(dim=0)
        beside.append(size)
        bases.append(new / size.clamp_min(torch.finfo(new.dtype).tiny))
        if step and bool((size <= 1e-6 * diagonal[0].abs().clamp_min(1e-30)).all()):
            break
    found = []
    for i in range(k):
        a = torch.stack([d[i] for d in diagonal]).double()
        b = torch.stack([s[i] for s in beside[:-1]]).double() if len(beside) > 1 else a.new_zeros(0)
        stop = next((j + 1 for j, s in enumerate(b) if s <= 1e-6 * a.abs().max()), len(a))
        T = torch.diag(a[:stop]) + torch.diag(b[: stop - 1], 1) + torch.diag(b[: stop - 1], -1)
        nodes, vectors = torch.linalg.eigh(T)
        found.append(vectors[0].square()[nodes > NULL * nodes.abs().max()])
    return found
