"""Singular values and norms of ``delta = scale * B @ A``, read off the factors.

The delta (out, in) is never formed. With thin QR decompositions B = Q_B R_B and Aᵀ = Q_A R_A, its singular values are
those of the small (r, r) matrix scale · R_B R_Aᵀ: O((out + in) r²) work. QR keeps small values accurate where the
cheaper Gram matrices would square them away; everything runs in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.lowrank.factors import LowRank


def singular_values(factors: LowRank) -> Float[Tensor, " r"]:
    """The singular values of the delta, largest first, in float64; min(r, in, out) of them."""
    r_b = torch.linalg.qr(factors.B.double(), mode="r").R
    r_a = torch.linalg.qr(factors.A.double().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.T) * abs(factors.scale)
    return values


def stable_rank(values: Float[Tensor, " r"]) -> float:
    """Squared Frobenius over squared spectral norm: 1 for one direction, r for r equal ones, 0 for a zero delta."""
    return float((values.square().sum() / values[0].square()).item()) if values[0] > 0 else 0.0


def effective_rank(values: Float[Tensor, " r"]) -> float:
    """exp of the entropy of p = sigma / sum(sigma) (Roy and Vetterli 2007); 0 for a zero delta."""
    if values[0] <= 0:
        return 0.0
    p = values / values.sum()
    return float(torch.exp(-(p * torch.log(p.clamp_min(torch.finfo(p.dtype).tiny))).sum()).item())


def energy_rank(values: Float[Tensor, " r"], share: float) -> int:
    """The smallest rank whose truncation keeps `share` of the squared Frobenius norm; 0 for a zero delta."""
    kept = torch.cumsum(values.square(), 0)
    if kept[-1] <= 0:
        return 0
    return int(torch.searchsorted(kept / kept[-1], torch.tensor(share, dtype=kept.dtype)).item()) + 1


def subspace_similarity(U: Float[Tensor, "d i"], V: Float[Tensor, "d j"]) -> Float[Tensor, "i j"]:
    """phi[i][j] = ||U_iᵀ V_j||² / min(i, j) of the first i columns of U and the first j of V, all orthonormal: 1 where the smaller
    space lies in the larger, on average max(i, j) / d where one is drawn at random (arXiv 2106.09685, section 7.2)."""
    overlap = (U.T @ V).square().cumsum(0).cumsum(1)
    counts = [torch.arange(1, n + 1, dtype=overlap.dtype, device=overlap.device) for n in overlap.shape]
    return overlap / torch.minimum(counts[0][:, None], counts[1][None])
