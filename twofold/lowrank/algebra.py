"""Sums and truncations of low-rank updates: exact from the factors, or from the true delta where a method needs every entry.

The sum of updates is itself low-rank, with the factors end to end: nothing is lost, and the ranks add up. The best update of a
smaller rank is the truncated singular value decomposition (Eckart and Young 1936), which two thin QR decompositions and one
of the small matrix between them give: O((out + in) r²) work, and no (out, in) matrix. TIES (arXiv 2306.01708) and DARE
(arXiv 2311.03099) choose among the entries of the deltas, so there the deltas are formed; what comes out has any rank, and is
brought down to the one asked for by the same truncation, its loss stated.

What is lost is told as a share of the energy, the squared Frobenius norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.errors import ConfigError
from twofold.lowrank.factors import LowRank

OVERSAMPLED, POWERS = 16, 3
"""Directions beyond the rank, and passes, of the sampled decomposition (Halko, Martinsson and Tropp 2011)."""
DEPENDENT = 1e-5
"""A column of which the ones before leave less than this share is left to a QR decomposition."""
ROUNDING = 1e-12
"""Singular values below this share of the largest are no directions."""
FIRST_GUESS = 32
"""The rank that is tried first where the energy decides; it doubles until that is enough."""


@dataclass(frozen=True)
class Decomposition:
    """delta = U diag(values) Vᵀ, largest values first, in float64 or the delta's own type."""

    U: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    V: Float[Tensor, "in_ k"]

    @property
    def rank(self) -> int:
        """Directions that are no rounding of float64."""
        return int((self.values > ROUNDING * self.values[0]).sum()) if self.values[0] > 0 else 0

    def truncated(self, r: int, energy: float) -> Reduced:
        """The r largest directions as factors that share each value's root, of a delta with this energy in all."""
        r = min(r, len(self.values))
        root = self.values[:r].sqrt()
        kept = float(self.values[:r].double().square().sum())
        lost = max(0.0, 1 - kept / energy) if energy > 0 else 0.0
        return Reduced(LowRank((self.V[:, :r] * root).T.contiguous(), self.U[:, :r] * root, 1.0), lost)


@dataclass(frozen=True)
class Reduced:
    """An update of a chosen rank, and the share of the energy that it lost."""

    update: LowRank
    lost: float


def decomposed(update: LowRank) -> Decomposition:
    """The singular value decomposition of the delta from its factors, in float64."""
    q_b, r_b = torch.linalg.qr(update.B.double())
    q_a, r_a = torch.linalg.qr(update.A.double().T)
    u, values, vh = torch.linalg.svd(r_b @ r_a.T * update.scale)
    k = len(values)
    return Decomposition(q_b @ u[:, :k], values, q_a @ vh[:k].T)


@dataclass(frozen=True)
class Bases:
    """Orthonormal bases of the spaces that a delta maps into and from, in float64, and all its singular values, largest first."""

    out: Float[Tensor, "out k"]
    in_: Float[Tensor, "in_ k"]
    values: Float[Tensor, " r"]


def bases_of(update: LowRank) -> Bases:
    """Of all directions that are no rounding; several times as fast as `decomposed`, which says them one by one."""
    out, in_ = _orthonormal(update.B.double()), _orthonormal(update.A.double().T)
    values = torch.linalg.svdvals((out.T @ update.B.double()) @ (update.A.double() @ in_)) * abs(update.scale)
    if bool(values[-1] > ROUNDING * values[0]) and len(values) == out.shape[1] == in_.shape[1]:
        return Bases(out, in_, values)
    found = decomposed(update)
    return Bases(found.U[:, : found.rank], found.V[:, : found.rank], found.values)


@dataclass(frozen=True)
class Leading:
    """The largest singular directions of a delta, largest first, and the Frobenius norm of all of it, in float64."""

    U: Float[Tensor, "out k"]
    V: Float[Tensor, "in_ k"]
    norm: float


def leading(update: LowRank, k: int) -> Leading:
    """The k largest directions, or all that are no rounding if they are fewer; much faster than `decomposed`.

    With Cholesky's L of each factor's products, B = Q_B L_Bᵀ and Aᵀ = Q_A L_Aᵀ: only L_Bᵀ L_A, (r, r), is decomposed, and of
    Q_B and Q_A no more is formed than what these directions take.
    """
    B, A_t = update.B.double(), update.A.double().T
    lower_b, lower_a = _lower(B), _lower(A_t)
    if lower_b is None or lower_a is None:
        found = decomposed(update)
        k = min(k, found.rank)
        return Leading(found.U[:, :k], found.V[:, :k], float(found.values.norm()))
    u, values, vh = torch.linalg.svd(lower_b.T @ lower_a * update.scale)
    k = min(k, int((values > ROUNDING * values[0]).sum()))
    in_b = torch.linalg.solve_triangular(lower_b.T, u[:, :k], upper=True)
    in_a = torch.linalg.solve_triangular(lower_a.T, vh[:k].T, upper=True)
    return Leading(B @ in_b, A_t @ in_a, float(values.norm()))


def truncated(update: LowRank, r: int) -> Reduced:
    """The best update of rank r at most, in the type of the factors; exact where the delta's rank is no larger."""
    found = decomposed(update)
    reduced = found.truncated(r, float(found.values.square().sum()))
    return Reduced(_typed(reduced.update, update.A.dtype), reduced.lost)


def concatenated(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ w_i delta_i exactly, at the sum of the ranks: a root of each |w_i scale_i| goes into A and B alike."""
    As, Bs = [], []
    for update, weight in zip(updates, weights, strict=True):
        factor = weight * update.scale
        root = math.sqrt(abs(factor))
        As.append(update.A * root)
        Bs.append(update.B * math.copysign(root, factor))
    return LowRank(torch.cat(As), torch.cat(Bs, 1), 1.0)


def linear(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ w_i delta_i at the rank of one of them, where all have the same A or the same B, as after training one factor only.

    Raises:
        ConfigError: the factors differ, so that summing them would make cross terms; says how large an error they would be.
    """
    first = updates[0]
    factors = [w * u.scale for u, w in zip(updates, weights, strict=True)]
    if all(torch.equal(u.A, first.A) for u in updates[1:]):
        return LowRank(first.A, sum_of([u.B * f for u, f in zip(updates, factors, strict=True)]), 1.0)
    if all(torch.equal(u.B, first.B) for u in updates[1:]):
        return LowRank(sum_of([u.A * f for u, f in zip(updates, factors, strict=True)]), first.B, 1.0)
    if len({u.rank for u in updates}) > 1:
        ranks = ", ".join(str(u.rank) for u in updates)
        raise ConfigError(f"their ranks are {ranks}, and factors of different ranks have no sum; use 'cat' or 'svd'")
    error = cross_terms(updates, weights)
    raise ConfigError(
        f"their A differ and so do their B: summing factors would be off by {error:.0%} of the true sum; use 'cat' or 'svd'"
    )


def cross_terms(updates: Sequence[LowRank], weights: Sequence[float]) -> float:
    """How far the product of summed factors, (Σ √w B)(Σ √w A), is from Σ w delta, relative to that, in Frobenius norm.

    Args:
        updates: all of one rank.
    """
    parts = concatenated(updates, weights)
    r = updates[0].rank
    A, B = sum_of(list(parts.A.split(r))), sum_of(list(parts.B.split(r, 1)))
    difference = concatenated([LowRank(A, B, 1.0), parts], [1.0, -1.0])
    return norm(difference) / norm(parts) if norm(parts) else 0.0


def norm(update: LowRank) -> float:
    """The Frobenius norm of the delta."""
    return math.sqrt(max(0.0, inner(update, update)))


def inner(a: LowRank, b: LowRank) -> float:
    """⟨delta_a, delta_b⟩ = s_a s_b tr((B_aᵀ B_b)(A_b A_aᵀ)), in float64, never forming a delta."""
    of_b = a.B.double().T @ b.B.double()
    of_a = a.A.double() @ b.A.double().T
    return float((of_b * of_a).sum()) * a.scale * b.scale


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def trimmed(delta: Float[Tensor, "out in_"], density: float) -> Float[Tensor, "out in_"]:
    """The entries of largest size, a share `density` of them; the others zero."""
    kept = max(1, round(density * delta.numel()))
    if kept >= delta.numel():
        return delta
    least = delta.abs().flatten().kthvalue(delta.numel() - kept + 1).values
    return torch.where(delta.abs() >= least, delta, 0.0)


def ties(
    updates: Sequence[LowRank], weights: Sequence[float], density: float, *, mean: bool = True
) -> Float[Tensor, "out in_"]:
    """TIES on the true deltas: trim each, elect each entry's sign by the weighted sum, combine the entries that agree with it.

    With `mean`, the weighted mean of those that agree, as the paper has it, times the sum of the weights, so that one
    adapter of weight 1 stays what it is; without, their weighted sum.
    """
    return elected([trimmed(u.delta() * w, density) for u, w in zip(updates, weights, strict=True)], weights, mean=mean)


def elected(
    deltas: Sequence[Float[Tensor, "out in_"]], weights: Sequence[float], *, mean: bool = True
) -> Float[Tensor, "out in_"]:
    """The second half of `ties`, of deltas that are weighted and thinned out already, in whatever way."""
    parts = torch.stack(list(deltas))
    agree = torch.sign(parts) == torch.sign(parts.sum(0))
    total = torch.where(agree, parts, 0.0).sum(0)
    if not mean:
        return total
    sizes = torch.tensor([abs(w) for w in weights], dtype=parts.dtype, device=parts.device)[:, None, None]
    agreeing = torch.where(agree & (parts != 0), sizes, 0.0).sum(0)
    return torch.where(agreeing > 0, total / agreeing.clamp_min(torch.finfo(parts.dtype).tiny), 0.0) * sizes.sum()


def dare(
    updates: Sequence[LowRank], weights: Sequence[float], density: float, generator: torch.Generator
) -> list[Float[Tensor, "out in_"]]:
    """DARE on the true deltas: each entry is dropped with probability 1 - density, and what stays is divided by density."""
    dropped = []
    for update, weight in zip(updates, weights, strict=True):
        delta = update.delta() * weight
        kept = torch.rand(delta.shape, generator=generator).to(delta.device) < density
        dropped.append(torch.where(kept, delta / density, 0.0))
    return dropped


def factored(delta: Float[Tensor, "out in_"], r: int, *, exact: bool = False) -> Reduced:
    """The best update of rank r of a delta that is given whole, in float32.

    By a sampled decomposition, whose error is within a per cent of the smallest possible, or with `exact` by the whole one.

    Raises:
        ConfigError: float32 cannot hold the delta; so in `factored_to_energy`.
    """
    wide = delta.to(torch.promote_types(delta.dtype, torch.float32))
    energy = _energy(wide)
    reduced = _largest(wide, r, exact=exact).truncated(r, energy)
    return Reduced(_typed(reduced.update, torch.float32), reduced.lost)


def factored_to_energy(delta: Float[Tensor, "out in_"], share: float, *, exact: bool = False) -> Reduced:
    """The best update that keeps this share of the energy, of no larger rank than that takes, as `factored` finds it.

    A sampled decomposition finds values a little small, so that its rank may come out a little larger than the exact one's.
    """
    wide = delta.to(torch.promote_types(delta.dtype, torch.float32))
    energy, r = _energy(wide), FIRST_GUESS
    while True:
        found = _largest(wide, r, exact=exact)
        kept = found.values.double().square().cumsum(0)
        if float(kept[-1]) >= share * energy or len(kept) == min(delta.shape):
            break
        r *= 2
    needed = int((kept < share * energy).sum()) + 1
    reduced = found.truncated(min(needed, len(kept)), energy)
    return Reduced(_typed(reduced.update, torch.float32), reduced.lost)


def _energy(delta: Tensor) -> float:
    """Squared Frobenius norm."""
    found = float(delta.norm(dtype=torch.float64)) ** 2
    if not math.isfinite(found):
        raise ConfigError("the update has values that float32 cannot hold; was it trained at too high a rate?")
    return found


def _largest(wide: Float[Tensor, "out in_"], r: int, *, exact: bool) -> Decomposition:
    """At least the r largest directions of a matrix, where it has so many."""
    if exact or 4 * (r + OVERSAMPLED) >= min(wide.shape):
        u, values, vh = torch.linalg.svd(wide.double(), full_matrices=False)
        return Decomposition(u, values, vh.T)
    return _sampled(wide, r + OVERSAMPLED)


def _sampled(wide: Float[Tensor, "out in_"], q: int) -> Decomposition:
    """About the q largest directions: those within the space that some passes make of random columns."""
    y = _orthonormal(wide @ torch.randn(wide.shape[1], q, dtype=wide.dtype))
    for _ in range(POWERS):
        y = _orthonormal(wide @ _orthonormal(wide.T @ y))
    v, values, uh = torch.linalg.svd(wide.T @ y, full_matrices=False)  # a tall one takes half the time of a wide one
    return Decomposition(y @ uh.T, values, v)


def _orthonormal(block: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """A basis of a few columns' space, by Cholesky's decomposition of their products in float64: several times as fast as a QR
    decomposition, which is made where they are so nearly dependent that this would lose them."""
    columns = block.double()
    lower = _lower(columns)
    if lower is None:
        found: Tensor = torch.linalg.qr(block).Q
    else:
        found = torch.linalg.solve_triangular(lower, columns.T, upper=False).T.to(block.dtype)
    return found


def _lower(columns: Float[Tensor, "n k"]) -> Float[Tensor, "k k"] | None:
    """L of columnsᵀ columns = L Lᵀ, unless they are nearly dependent."""
    lower, failed = torch.linalg.cholesky_ex(columns.T @ columns)
    sizes = lower.diagonal()
    return None if int(failed) or not bool(sizes.min() > DEPENDENT * sizes.max()) else lower


def _typed(update: LowRank, dtype: torch.dtype) -> LowRank:
    return LowRank(update.A.to(dtype), update.B.to(dtype).contiguous(), update.scale)
