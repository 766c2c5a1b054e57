"""A module's update small enough to be drawn: exact singular values, and singular vectors averaged over blocks of rows.

The mean of a block of the delta's entries is Σ_k u_k s_k v_kᵀ of the blocks' means, for every truncation: averaging is linear. So a
page that has the averaged vectors draws the delta at any rank without a matrix of its size ever being sent.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.adapter.files import AdapterFiles
from twofold.adapter.updates import updates_of
from twofold.errors import ConfigError, did_you_mean
from twofold.lowrank.algebra import decomposed
from twofold.lowrank.factors import LowRank
from twofold.lowrank.spectra import singular_values
from twofold.tensorfile import nonfinite

BLOCKS = 96
"""Rows and columns of a picture, at most."""


def module_picture(files: AdapterFiles, module: str) -> dict[str, Any]:
    """One module of an adapter, to be drawn at any rank.

    Raises:
        ConfigError: it has no such module, or the module holds NaN or infinity.
        AdapterFileError: a module has only one of its two factors.
    """
    update = _update(files, module)
    found = decomposed(update)
    rows, columns = update.B.shape[0], update.A.shape[1]
    return {
        "name": module,
        "shape": [rows, columns],
        "rows": rows,
        "columns": columns,
        "r": update.rank,
        "scale": update.scale,
        "singular_values": found.values.tolist(),
        "energy": float(found.values.square().sum()),
        "u": block_means(found.U).tolist(),
        "v": block_means(found.V).tolist(),
    }


def energy_curve(files: AdapterFiles) -> dict[str, Any]:
    """What each rank keeps of the squared Frobenius norm: by module, and of all modules together at that rank in each.

    Raises:
        AdapterFileError: a module has only one of its two factors.
    """
    squares = {
        name: singular_values(u).square()
        for name, u in updates_of(files).items()
        if not nonfinite({"A": u.A, "B": u.B})
    }
    longest = max((len(s) for s in squares.values()), default=0)
    kept = torch.stack([_filled(s.cumsum(0), longest) for s in squares.values()]) if squares else torch.zeros(1, 0)
    shares = [{"name": n, "energy": _shares(s.cumsum(0))} for n, s in squares.items()]
    return {"modules": shares, "total": _shares(kept.sum(0))}


def block_means(vectors: Float[Tensor, "n k"], most: int = BLOCKS) -> Float[Tensor, "b k"]:
    """The mean of each of at most `most` blocks of neighbouring rows, as equal as they can be."""
    return torch.stack([block.mean(0) for block in vectors.tensor_split(min(most, len(vectors)))])


def _update(files: AdapterFiles, module: str) -> LowRank:
    updates = updates_of(files)
    if module not in updates:
        raise ConfigError(f"no module '{module[:200]}' in this adapter{did_you_mean(module[:200], updates)}")
    update = updates[module]
    if nonfinite({"A": update.A, "B": update.B}):
        raise ConfigError(f"'{module}' holds NaN or infinity, so there is nothing to draw")
    return update


def _filled(kept: Tensor, length: int) -> Tensor:
    """Beyond its own rank a module keeps everything."""
    return torch.cat([kept, kept[-1:].expand(length - len(kept))])


def _shares(kept: Tensor) -> list[float]:
    if not len(kept) or kept[-1] <= 0:
        return [1.0] * len(kept)
    found: list[float] = (kept / kept[-1]).tolist()
    return found
