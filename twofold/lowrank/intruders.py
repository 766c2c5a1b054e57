"""A weight and its update beside each other: how large, how much is amplified, what is new. Nothing is decomposed whole.

*Amplification* (arXiv 2106.09685, section 7.3) is ‖delta‖_F / ‖Uᵀ W V‖_F with U, V the update's own singular directions: how much
louder than in W they are.
An *intruder* (arXiv 2410.21228) is one of the k largest left singular vectors y of W + delta that is like none of W's: max_i
|cos(y, u_i)| < epsilon. The y come from a few block iterations with W x + scale·B(A x). Their cosines need no decomposition of W
either: Lanczos on W Wᵀ started at y gives the weights cos²(y, u_i) as those of a Gauss quadrature, directions of W
whose values lie too close to be told apart counted as one; so a mixture of such neighbours is not called an intruder.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.lowrank.algebra import Decomposition
from twofold.lowrank.factors import LowRank

POWERS, BLOCK = 3, 16
"""Passes and columns of the block iteration for a spectral norm, which is found from below, by a few per cent at most."""
PASSES, OVERSAMPLED = 8, 8
"""The same for the k largest directions of the changed weight: columns beyond k."""
STEPS = 32
"""Of Lanczos: a direction that is like none of W's spreads over so many nodes, and must not seem to lie in a few."""
ALIKE = 0.5
"""The cosine below which a direction is new: the paper's epsilon."""
ROUNDING = 1e-12


def spectral_norm(weight: Float[Tensor, "out in_"]) -> float:
    """The largest singular value, to a few per cent from below, by block power iteration."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(weight.shape[1], BLOCK, generator=generator).to(weight)
    for _ in range(POWERS):
        x = weight.T @ (weight @ torch.linalg.qr(x).Q)
    return float(torch.linalg.matrix_norm(weight @ torch.linalg.qr(x).Q, 2))


def amplification(weight: Float[Tensor, "out in_"], found: Decomposition) -> float:
    """‖delta‖_F / ‖Uᵀ W V‖_F of a decomposed update; infinity where W does nothing in those directions, zero for a zero one."""
    if found.values[0] <= 0:
        return 0.0
    real = int((found.values > ROUNDING * found.values[0]).sum())
    U, V = (side[:, :real].to(weight) for side in (found.U, found.V))
    own = float((U.T @ (weight @ V)).norm())
    return float(found.values.norm()) / own if own else float("inf")


def intruders(weight: Float[Tensor, "out in_"], update: LowRank, k: int) -> list[float]:
    """max_i |cos(y, u_i)| for the k largest left singular vectors y of W + delta, the largest first; below ALIKE are intruders."""
    k = min(k, *weight.shape)
    A, B = update.A.to(weight), update.B.to(weight) * update.scale
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(len(weight), min(k + OVERSAMPLED, *weight.shape), generator=generator).to(weight)
    for _ in range(PASSES):
        x = torch.linalg.qr(weight.T @ y + A.T @ (B.T @ y)).Q
        y = weight @ x + B @ (A @ x)
    u, _, _ = torch.linalg.svd(y, full_matrices=False)
    return [_largest_cosine(w) for w in _quadratures(weight, u[:, :k])]


def _largest_cosine(weights: Tensor) -> float:
    return float(weights.max().clamp(0, 1).sqrt())


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
        found.append(torch.linalg.eigh(T).eigenvectors[0].square())
    return found
