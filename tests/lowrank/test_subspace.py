"""Random maps of subspaces: transposes are transposes, columns have length one, and Hadamard is Sylvester's."""

from __future__ import annotations

import math

import pytest
import torch

from twofold.lowrank.subspace import KINDS, Fastfood, Sparse, walsh_hadamard


def matrix(projection: Sparse | Fastfood, d: int) -> torch.Tensor:
    return torch.stack([projection.apply(row) for row in torch.eye(d)], 1)


@pytest.mark.parametrize("kind", ["sparse", "fastfood"])
@pytest.mark.parametrize(("size", "d"), [(50, 8), (7, 13), (64, 1)])
def test_the_transpose_is_that_of_the_matrix(kind: str, size: int, d: int) -> None:
    projection = KINDS[kind].draw(size, d, size, seed=3)  # type: ignore[index]
    g = torch.randn(size)
    assert torch.allclose(projection.transpose(g), matrix(projection, d).T @ g, atol=1e-5)


@pytest.mark.parametrize("kind", ["sparse", "fastfood"])
def test_columns_have_length_one_over_the_whole_model_and_hardly_overlap(kind: str) -> None:
    """Cut into tensors of several sizes, as a model's values are."""
    sizes, d = [3000, 500, 1596], 24
    P = torch.cat([matrix(KINDS[kind].draw(n, d, sum(sizes), seed=i), d) for i, n in enumerate(sizes)])  # type: ignore[index]
    gram = P.T @ P
    assert torch.allclose(gram.diagonal(), torch.ones(d), atol=0.25)
    assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 0.15
    if kind == "sparse":
        assert torch.equal(gram, torch.diag(gram.diagonal()))


def test_the_same_seed_draws_the_same_map() -> None:
    z = torch.randn(10)
    first, again, other = (Fastfood.draw(100, 10, 100, seed).apply(z) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_walsh_hadamard_is_sylvesters_matrix() -> None:
    H = torch.ones(1, 1)
    for _ in range(4):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    x = torch.randn(3, 16)
    assert torch.allclose(walsh_hadamard(x), x @ H, atol=1e-5)
    assert torch.allclose(walsh_hadamard(walsh_hadamard(x)), 16 * x, atol=1e-4)
    assert math.isclose(float(walsh_hadamard(torch.ones(1, 1))), 1.0)
