"""The starts that are read off something: the weight (PiSSA, OLoRA), its gradient (LoRA-GA), its inputs (EVA), or the
error of its quantisation (LoftQ).

The papers of PiSSA, OLoRA and LoRA-GA subtract their start from the base, so that the model is the base at step 0. Here the
base stays, and who uses such a start subtracts it from the update instead: W + s·BA − s·B0A0.

Every function takes weights in any type and computes in float32 or wider.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.errors import ConfigError
from twofold.lowrank.init import Factors

LORA_GA_GAMMA = 16.0
"""The stability constant of LoRA-GA, as in its code and PEFT."""


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _check_rank(r: int, weight: Tensor) -> None:
    if r > min(weight.shape):
        raise ConfigError(
            f"this start takes rank {r} out of a weight of shape {tuple(weight.shape)}, which has but {min(weight.shape)}; "
            "choose a lower r, by rank_pattern for this module alone, or another init_lora_weights"
        )


def pissa(weight: Float[Tensor, "out in_"], r: int, scale: float) -> Factors:
    """The r largest singular triples, split evenly: s·BA is the best rank-r approximation of W (arXiv 2404.02948)."""
    _check_rank(r, weight)
    U, S, Vh = torch.linalg.svd(_wide(weight), full_matrices=False)
    return _halves(U[:, :r], S[:r] / scale, Vh[:r])


def fast_pissa(iterations: int) -> Callable[[Tensor, int, float], Factors]:
    """The same by a randomised SVD with so many power iterations (PEFT's ``pissa_niter_N``); draws from torch's generator."""

    def start(weight: Float[Tensor, "out in_"], r: int, scale: float) -> Factors:
        _check_rank(r, weight)
        U, S, V = torch.svd_lowrank(_wide(weight), r, niter=iterations)
        return _halves(U, S / scale, V.T)

    return start


def _halves(U: Tensor, S: Tensor, Vh: Tensor) -> Factors:
    roots = S.sqrt()
    return roots[:, None] * Vh, U * roots


def olora(weight: Float[Tensor, "out in_"], r: int, scale: float) -> Factors:
    """The first r columns of Q and rows of R of W = QR (arXiv 2406.01775); `scale` plays no part in it."""
    _check_rank(r, weight)
    Q, R = torch.linalg.qr(_wide(weight))
    return R[:r].contiguous(), Q[:, :r].contiguous()


def lora_ga(gradient: Float[Tensor, "out in_"], r: int, scale: float) -> Factors:
    """Along the gradient (arXiv 2407.05000): B the first r left singular vectors, A the next r right ones.

    Then the first step of the update is the best rank-2r step of full fine-tuning's. Both are scaled to be stable whatever
    the width: each by out^(1/4) / sqrt(gamma), as in the authors' code; `scale` plays no part in it.
    """
    _check_rank(2 * r, gradient)
    U, _, V = torch.svd_lowrank(_wide(gradient), q=min(4 * r, *gradient.shape), niter=16)
    stable = len(gradient) ** 0.25 / LORA_GA_GAMMA**0.5
    return V.T[r : 2 * r] * stable, U[:, :r] * stable


def eva(inputs: Float[Tensor, "in_ in_"], r: int, out_features: int) -> Factors:
    """A the r main directions of the inputs, from their second moments Σ x xᵀ; B zero (arXiv 2410.07170)."""
    found = torch.linalg.eigh(inputs.double()).eigenvectors.flip(1)[:, :r]
    return found.T.contiguous().float(), torch.zeros(out_features, r)


def eva_ranks(
    explained: Mapping[str, Float[Tensor, " components"]], ranks: Mapping[str, int], rho: float = 2.0
) -> dict[str, int]:
    """EVA's redistribution: the same number of ranks in all, given to the directions that explain most of their inputs.

    Args:
        explained: by module, the share of its inputs' energy in each direction, largest first.
        ranks: what each module would have without it.
        rho: no module gets more than so many times its own rank, nor less than one.
    """
    found = dict.fromkeys(ranks, 1)
    candidates = [
        (float(share), name)
        for name, shares in explained.items()
        for share in shares[1 : max(1, int(rho * ranks[name]))]
    ]
    budget = sum(ranks.values()) - len(ranks)
    for _, name in sorted(candidates, key=lambda pair: (-pair[0], pair[1]))[:budget]:
        found[name] += 1
    return found


def loftq(
    weight: Float[Tensor, "out in_"],
    roundtrip: Callable[[Tensor], Tensor],
    r: int,
    scale: float,
    iterations: int = 1,
) -> tuple[Factors, Float[Tensor, "out in_"]]:
    """Quantised weight and factors that approximate W together: alternately Q = q(W − s·BA) and s·BA = svd_r(W − Q).

    Args:
        roundtrip: quantises and dequantises a weight.
        iterations: 1 keeps the base's own quantisation q(W), and the factors make up for the most of its error.

    Returns:
        A and B, and the dequantised weight that belongs to them (arXiv 2310.08659).
    """
    _check_rank(r, weight)
    wide = _wide(weight)
    A, B = wide.new_zeros(r, wide.shape[1]), wide.new_zeros(len(wide), r)
    quantised = wide
    for _ in range(iterations):
        quantised = roundtrip(wide - scale * B @ A).to(wide)
        U, S, Vh = torch.linalg.svd(wide - quantised, full_matrices=False)
        A, B = _halves(U[:, :r], S[:r] / scale, Vh[:r])
    return (A, B), quantised


WEIGHT_STARTS: dict[str, Callable[[Tensor, int, float], Factors]] = {"pissa": pissa, "olora": olora}
"""By the value of ``init_lora_weights``: from a weight (out, in), a rank and a scale."""
DATA_STARTS = ("eva", "lora_ga", "loftq")
"""Starts that need more than the base: their factors are computed before and handed to `attach`."""


def weight_start(name: bool | str) -> Callable[[Tensor, int, float], Factors] | None:
    """The start of that name that reads the weight; None for one that does not."""
    fast = re.fullmatch(r"pissa_niter_(\d+)", str(name))
    return fast_pissa(int(fast.group(1))) if fast else WEIGHT_STARTS.get(str(name))


def directions(name: bool | str, r: int) -> int:
    """How many singular directions the start of that name takes out of a weight, or out of its gradient or its error; 0 for one
    that reads none of them."""
    if name == "lora_ga":
        return 2 * r
    return r if name == "loftq" or weight_start(name) is not None else 0


def is_subtracted(name: bool | str) -> bool:
    """Whether the update is counted from this start, whose product is not zero."""
    return name == "lora_ga" or weight_start(name) is not None
