"""Cases that the page's maths and Python's must agree on: src/maths/cases.json.

python studio/make_cases.py

Inputs are drawn from a fixed seed; what is expected of them comes from `twofold.lowrank`, from dense NumPy where that is the
plainer oracle, and from torch's own autograd and Adam. `npm test` holds the page's functions to the file, pytest holds the file
to Python.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.lowrank.algebra import truncated
from twofold.lowrank.factors import LowRank, scale_of
from twofold.lowrank.spectra import effective_rank, energy_rank, singular_values, stable_rank

FILE = Path(__file__).parent / "src" / "maths" / "cases.json"
SHARES = (0.5, 0.9, 0.99)


def cases() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(7)
    return {
        "parameters": [
            parameters(*shape) for shape in ((4096, 4096, 8), (576, 1536, 16), (192, 576, 1), (8192, 28672, 64))
        ],
        "scales": [scales(alpha, r) for alpha, r in ((16, 8), (32, 16), (16, 64), (1, 1))],
        "updates": [update(*shape, draw) for shape in ((6, 5, 3), (12, 9, 4), (7, 20, 1), (5, 4, 4))]
        + [deficient(draw)],
        "matrices": [matrix(*shape, draw) for shape in ((5, 5), (8, 3), (3, 8))],
        "descents": [descent(9, 7, 3, scale, rate, draw) for scale, rate in ((2.0, 0.02), (0.5, 0.1))],
    }


def parameters(rows: int, columns: int, r: int) -> dict[str, Any]:
    factors = LowRank(torch.empty(r, columns, device="meta"), torch.empty(rows, r, device="meta"), 1.0)
    return {
        "rows": rows,
        "columns": columns,
        "r": r,
        "full": rows * columns,
        "lora": factors.A.numel() + factors.B.numel(),
    }


def scales(alpha: float, r: int) -> dict[str, Any]:
    plain, stabilised = (scale_of(float(alpha), r, rank_stabilised=rs) for rs in (False, True))
    return {"alpha": alpha, "r": r, "plain": plain, "stabilised": stabilised}


def update(rows: int, columns: int, r: int, draw: torch.Generator) -> dict[str, Any]:
    return told(LowRank(normal(draw, r, columns), normal(draw, rows, r), 1.5))


def deficient(draw: torch.Generator) -> dict[str, Any]:
    """Two directions of B are the same one, so that the rank is below r."""
    B = normal(draw, 8, 2)
    return told(LowRank(normal(draw, 3, 6), torch.cat([B, B[:, :1]], 1), -0.5))


def told(factors: LowRank) -> dict[str, Any]:
    delta, values = factors.delta(), singular_values(factors)
    return {
        "A": factors.A.tolist(),
        "B": factors.B.tolist(),
        "scale": factors.scale,
        "delta": delta.tolist(),
        "singular_values": values.tolist(),
        "rank": int(np.linalg.matrix_rank(delta.numpy())),
        "stable_rank": stable_rank(values),
        "effective_rank": effective_rank(values),
        "energy_ranks": [[share, energy_rank(values, share)] for share in SHARES],
        "truncations": [truncation(factors, r) for r in range(1, factors.rank + 1)],
    }


def truncation(factors: LowRank, r: int) -> dict[str, Any]:
    """What the best update of rank r keeps, and how far it is from the whole by dense NumPy."""
    whole, reduced = factors.delta().numpy(), truncated(factors, r)
    left = np.linalg.norm(whole - reduced.update.delta().numpy()) / np.linalg.norm(whole)
    return {"r": r, "energy": 1 - reduced.lost, "error": float(left)}


def matrix(rows: int, columns: int, draw: torch.Generator) -> dict[str, Any]:
    values = normal(draw, rows, columns)
    return {"rows": values.tolist(), "singular_values": np.linalg.svd(values.numpy(), compute_uv=False).tolist()}


def descent(rows: int, columns: int, r: int, scale: float, rate: float, draw: torch.Generator) -> dict[str, Any]:
    """Five steps of torch's Adam on ||scale B A - target||² / rows, from B = 0."""
    target = normal(draw, rows, columns)
    A, B = normal(draw, r, columns).requires_grad_(), torch.zeros(rows, r, dtype=torch.float64, requires_grad=True)
    found: dict[str, Any] = {"A": A.tolist(), "target": target.tolist(), "scale": scale, "rate": rate, "losses": []}
    adam = torch.optim.Adam([A, B], lr=rate)
    for step in range(6):
        loss = (scale * B @ A - target).square().sum() / rows
        found["losses"].append(loss.item())
        if step < 5:
            adam.zero_grad()
            loss.backward()
            adam.step()
    return {**found, "A_after": A.tolist(), "B_after": B.tolist()}


def normal(draw: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64)


if __name__ == "__main__":
    FILE.write_text(json.dumps(cases(), separators=(",", ":")) + "\n")
