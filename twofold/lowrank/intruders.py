"""What an update brings that its weight W did not have, without decomposing anything whole.

An *intruder* (arXiv 2410.21228) is one of the k largest left singular vectors y of W + delta that is like none of W's: max_i
|cos(y, u_i)| < epsilon. By definition that takes two whole decompositions of W's size (`intruders_exactly`). `intruders` reads W a
few times instead, each step only for the y that the one before left open:

1. The y are the largest left Ritz vectors of W + delta in a block Krylov space (Musco and Musco 2015), for which W is read four
   times.
2. The same space gives Ritz vectors u of W itself, with v and sigma, without another product, since (W + delta) X is known and
   delta X cheap. A y that is like one of these is no intruder, if that one is a direction of W, which one more product tells:
   ‖Wᵀ u - sigma v‖ is small beside sigma. Where it is not, Wᵀ u widens the space.
3. For the others, Lanczos on W Wᵀ started at y gives cos²(y, u_i) as the weights of Gauss quadratures. By the separation theorem of
   Chebyshev, Markov and Stieltjes no u_i has more than two neighbouring weights together; once these are below epsilon² for all
   neighbours, y is an intruder, and more steps would tell nothing new.

Directions of W whose values lie too close to be told apart count as one; so a mixture of such neighbours is not called an intruder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twofold.lowrank.beside import COLUMNS, Weight, random_block
from twofold.lowrank.factors import LowRank

BLOCKS = 4
"""Of the Krylov space; twice as many where what it shows is not settled."""
REFINED = 2
"""How often the space is widened where W's own directions in it are not known well enough."""
MOST_COLUMNS = (2 * BLOCKS + REFINED) * COLUMNS
"""Of the space at its widest; what has no more rows or columns than that is decomposed whole."""
CONVERGED = 0.05
"""A Ritz vector is a direction of W, or a mixture of some whose values lie that close, if its residual is below this share."""
STEPS = 48
"""Of Lanczos at most; after 32, the tail of a steep spectrum still counts as one direction."""
CHECKED_EVERY, STAYS = 4, 0.02
"""Of these steps: whether more are needed; and by how little a weight changes in them that stays."""
ENDED, TINY = 1e-6, 1e-30
"""A run is over where what is new is below this share of its first value; and what is divided by instead of zero."""
ALIKE = 0.5
"""The cosine below which a direction is new: the paper's epsilon."""
SURELY = 0.6
"""The cosine with a Ritz vector that is taken for the one with W's own direction."""
NULL = 1e-6
"""Squared singular values below this share of the largest are no directions of W, and what lies there is new."""


class Likeness(NamedTuple):
    """Of the k largest left singular vectors y of W + delta, the largest first, max_i |cos(y, u_i)|: below ALIKE are intruders.

    The spectral norm of W comes along, from below, and far from it where the update is louder than W.
    """

    cosines: list[float]
    spectral_norm: float


def intruders_exactly(weight: Weight, update: LowRank, k: int) -> Likeness:
    """By whole decompositions in float32 or wider."""
    wide = weight.stored.to(torch.promote_types(weight.stored.dtype, torch.float32))
    own, values, _ = torch.linalg.svd(wide, full_matrices=False)
    changed = torch.linalg.svd(wide + update.delta().to(wide), full_matrices=False).U[:, :k]
    real = values.square() > NULL * values[0].square()
    cosines = (own * real).T @ changed
    return Likeness([float(x) for x in cosines.abs().amax(0)], float(values[0]))


def intruders(weight: Weight, update: LowRank, k: int) -> Likeness:
    """The same without decomposing a large weight whole; to a few hundredths, or to either side of `ALIKE`.

    Where products are made in a 16-bit type, what W maps to nothing cannot be told from its smallest directions, and may count as
    one of them.
    """
    if min(weight.shape) <= MOST_COLUMNS:
        return intruders_exactly(weight, update, k)
    factors = update.A.float(), update.B.float() * update.scale
    found, sure = _look(weight, *factors, k, BLOCKS)
    return found if sure else _look(weight, *factors, k, 2 * BLOCKS)[0]


def _look(weight: Weight, A: Tensor, B: Tensor, k: int, blocks: int) -> tuple[Likeness, bool]:
    """In a Krylov space of so many blocks; and whether all that seem to be intruders are directions of W + B A indeed."""
    space, images = _krylov(weight, A, B, blocks)
    changed = _ritz(space, images, k)
    for left_over in reversed(range(REFINED + 1)):
        own = _ritz(space, images - B @ (A @ space), COLUMNS)
        back = weight.times_transposed(own.left)
        cosines, best = (changed.left.T @ own.left).abs().max(1)
        like, known = cosines >= SURELY, own.converged(back)[best]
        if not left_over or bool((known | ~like).all()):
            break
        more = _orthonormal_beside(space, back)
        space, images = torch.cat([space, more], 1), torch.cat([images, weight.times(more) + B @ (A @ more)], 1)
    found = [min(float(c), 1.0) for c in cosines]
    left = (~(like & known)).nonzero().flatten().tolist()
    if left:
        for i, cosine in zip(left, _cosines(weight, changed.left[:, left]), strict=True):
            found[i] = cosine
    new = changed.some([i for i in left if found[i] < ALIKE])
    sure = not new.values.numel() or bool(
        new.converged(weight.times_transposed(new.left) + A.T @ (B.T @ new.left)).all()
    )
    return Likeness(found, float(own.values[:1].sum())), sure


def _krylov(weight: Weight, A: Tensor, B: Tensor, blocks: int) -> tuple[Float[Tensor, "in_ n"], Float[Tensor, "out n"]]:
    """An orthonormal basis of the space of (Mᵀ M)^j x for random x, M being W + B A; and M times it."""
    new = torch.linalg.qr(random_block(weight)).Q
    space, images = new, []
    for _ in range(blocks - 1):
        image, back = weight.there_and_back(new, B @ (A @ new))
        images.append(image)
        new = _orthonormal_beside(space, back + A.T @ (B.T @ image))
        space = torch.cat([space, new], 1)
    return space, torch.cat([*images, weight.times(new) + B @ (A @ new)], 1)


def _orthonormal_beside(space: Float[Tensor, "in_ n"], x: Float[Tensor, "in_ m"]) -> Float[Tensor, "in_ m"]:
    """An orthonormal basis of what x adds to a space."""
    for _ in range(2):  # once loses what rounding brings back
        x = torch.linalg.qr(x - space @ (space.T @ x)).Q
    return x


class Ritz(NamedTuple):
    """Singular vectors and values of a matrix in a space, the largest first: near its own, or mixtures of them."""

    left: Float[Tensor, "out n"]
    values: Float[Tensor, " n"]
    right: Float[Tensor, "in_ n"]

    def some(self, which: list[int]) -> Ritz:
        return Ritz(self.left[:, which], self.values[which], self.right[:, which])

    def converged(self, back: Float[Tensor, "in_ n"]) -> Bool[Tensor, " n"]:
        """Which are the matrix's own.

        Args:
            back: its transpose times the left ones.
        """
        residuals: Tensor = (back - self.right * self.values).norm(dim=0)
        return (residuals <= CONVERGED * self.values) & (self.values > 0)


def _ritz(space: Float[Tensor, "in_ n"], images: Float[Tensor, "out n"], count: int) -> Ritz:
    """The first so many.

    Args:
        images: the matrix times an orthonormal basis of the space.
    """
    wide = images.double()
    vectors: Tensor = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)[:, :count].float()
    left = images @ vectors
    values = left.norm(dim=0)
    return Ritz(left / values.clamp_min(TINY), values, space @ vectors)


def _cosines(weight: Weight, starts: Float[Tensor, "out k"]) -> list[float]:
    """The largest cosine of each start with a left singular vector of W, or with several that lie too close to be told apart.

    Lanczos runs go side by side, so that W is read twice a step for all of them, until each is known to be an intruder.
    """
    steps = min(STEPS, weight.shape[0])
    bases = torch.zeros(starts.shape[1], steps + 1, weight.shape[0])
    bases[:, 0] = (starts / starts.norm(dim=0)).T
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    most = torch.zeros(starts.shape[1], dtype=torch.float64)
    for step in range(1, steps + 1):
        last, held = bases[:, step - 1].T, bases[:, :step]
        new = weight.times(weight.times_transposed(last)).T
        diagonal.append((new * last.T).sum(1))
        for _ in range(2):  # once loses what rounding brings back
            new = new - ((held @ new[:, :, None]).mT @ held)[:, 0]
        size = new.norm(dim=1)
        beside.append(size)
        ended = bool((size <= ENDED * diagonal[0].clamp_min(TINY)).all())
        if step % CHECKED_EVERY == 0 or ended or step == steps:
            found = _quadratures(torch.stack(diagonal, 1), torch.stack(beside, 1))
            before, most = most, found.weights.amax(1)
            if ended or bool((_spread(found.weights) | _settled(found, before)).all()):
                break
        bases[:, step] = new / size.clamp_min(TINY)[:, None]
    return [float(w) for w in most.clamp(0, 1).sqrt()]


def _spread(weights: Float[Tensor, "k n"]) -> Tensor:
    """For which starts no direction can have a cosine of ALIKE: it has at most two neighbouring weights together."""
    ends = torch.nn.functional.pad(weights, (1, 1))
    return (ends[:, 1:] + ends[:, :-1]).amax(1) < ALIKE**2


class Quadratures(NamedTuple):
    """Of the runs' measures over the spectrum of W Wᵀ, by growing node.

    Attributes:
        weights: zero at nodes that are zero.
        converged: whether a node is a direction of W, or some that lie close: the Ritz vector's residual tells.
    """

    weights: Float[Tensor, "k n"]
    converged: Bool[Tensor, "k n"]


def _settled(found: Quadratures, before: Float[Tensor, " k"]) -> Tensor:
    """Which starts are surely like some direction: their largest weight is large, stays, and lies on a direction of W.

    Without the last, the node by which a run comes near to zero would do, which stands for all that W maps to nothing.
    """
    most, at = found.weights.max(1)
    on_one = found.converged.gather(1, at[:, None])[:, 0]
    return (most > SURELY**2) & ((most - before).abs() < STAYS) & on_one


def _quadratures(a: Float[Tensor, "k n"], b: Float[Tensor, "k n"]) -> Quadratures:
    """Gauss quadratures.

    Args:
        a, b: the runs' tridiagonal matrices: diagonals, and what is beside them, of which the last leads out of the matrix.
    """
    a, b = a.double(), b.double()
    alive = (b > ENDED * a.abs().amax(1, keepdim=True)).cumprod(1)  # beyond its end a run goes on with rounding
    inner = (b * alive)[:, :-1]
    T = torch.diag_embed(a) + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
    nodes, vectors = torch.linalg.eigh(T)
    weights = torch.where(nodes > NULL * nodes.abs().amax(1, keepdim=True), vectors[:, 0].square(), 0.0)
    return Quadratures(weights, b[:, -1:] * vectors[:, -1].abs() <= CONVERGED * nodes)
