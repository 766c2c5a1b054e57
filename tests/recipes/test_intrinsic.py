"""`intrinsic`: gradients of z against autograd's, d90 on a task that a subspace can learn, and resuming."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_base import llama
from tiny_runs import changed
from torch.func import functional_call

from twofold.errors import BaseError, ConfigError, RunError
from twofold.recipes.intrinsic import Search, intrinsic, reached
from twofold.recipes.settings import TrainConfig
from twofold.training.subspace import Subspace, layer_of

pytest_plugins = ("tiny_fixtures",)


@pytest.mark.parametrize("kind", ["sparse", "fastfood"])
@pytest.mark.parametrize("layers", [False, True])
def test_gradients_are_autograds(kind: str, layers: bool) -> None:
    model = llama(60)
    ids = torch.randint(3, 60, (2, 12))
    subspace = Subspace(model, 12, kind, 5, layers=layers)  # type: ignore[arg-type]
    with torch.no_grad():
        subspace.z.copy_(torch.randn(12))
        subspace.factors.mul_(torch.linspace(0.5, 1.5, len(subspace.factors)))
    subspace.place()
    with subspace.projecting():
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    P = [torch.stack([p.projection.apply(row) for row in torch.eye(12)], 1) for p in subspace.parts]
    z, factors = (t.detach().clone().requires_grad_() for t in (subspace.z, subspace.factors))
    names = [n for n, _ in model.named_parameters()]
    theta = {
        n: part.start + (factors[part.layer] * (p @ z)).view(part.start.shape)
        for n, part, p in zip(names, subspace.parts, P, strict=True)
    }
    functional_call(model, theta, kwargs={"input_ids": ids, "labels": ids}).loss.backward()
    assert z.grad is not None
    assert factors.grad is not None
    assert torch.allclose(subspace.z.grad, z.grad, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(subspace.factors.grad, factors.grad, atol=1e-5)  # type: ignore[arg-type]
    subspace.restore()
    fresh = llama(60)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_layers_are_told_by_their_numbers() -> None:
    assert layer_of("model.layers.3.mlp.up_proj.weight") == layer_of("model.layers.3.input_layernorm.weight")
    assert layer_of("model.layers.3.mlp.up_proj.weight") != layer_of("model.layers.4.mlp.up_proj.weight")
    assert layer_of("model.embed_tokens.weight") != layer_of("lm_head.weight")


@pytest.fixture
def task(config: TrainConfig) -> TrainConfig:
    return changed(config, learning_rate=3e-3, epochs=6)


def test_more_dimensions_learn_more_and_the_curve_is_kept(task: TrainConfig) -> None:
    search = Search(dimensions=(1, 4000), rate_factors=(0.3, 1.0))
    found = intrinsic(task, search)
    few, many = found["curve"]
    assert found["full"]["loss"] < 0.5 * found["untouched"]["loss"]
    assert many["loss"] < 0.7 * found["untouched"]["loss"]
    assert many["score"] > few["score"] + 0.2
    assert found["goals"]["score"] == pytest.approx(0.9 * found["full"]["score"])
    folder = Path(found["folder"])
    assert json.loads((folder / "intrinsic.json").read_text())["curve"] == found["curve"]
    assert (folder / "curve.svg").read_text().startswith("<svg")
    assert found["d90"] in (None, 4000)


def test_what_was_measured_is_not_measured_again(task: TrainConfig) -> None:
    quick = changed(task, max_steps=3)
    first = intrinsic(quick, Search(dimensions=(20,), rate_factors=(1.0,), projection="fastfood", layers=True))
    with pytest.raises(RunError, match="pass --resume"):
        intrinsic(quick, Search(dimensions=(20,), rate_factors=(1.0,)))
    results = Path(first["folder"]) / "results.json"
    known = json.loads(results.read_text())
    known["full"]["score"] = 0.123
    results.write_text(json.dumps(known))
    again = intrinsic(
        quick, Search(dimensions=(20,), rate_factors=(1.0,), projection="fastfood", layers=True), resume=True
    )
    assert again["full"]["score"] == 0.123
    assert again["curve"] == first["curve"]
    with pytest.raises(RunError, match="other settings"):
        intrinsic(replace(quick, dtype="bfloat16"), Search(dimensions=(30,)), resume=True)


def test_what_cannot_be_searched_is_refused_before_anything_is_measured(task: TrainConfig) -> None:
    """And the mended search goes on in the same folder."""
    quick, one = changed(task, max_steps=1), {"rate_factors": (1.0,), "layers": True}
    with pytest.raises(BaseError, match="no base at"):
        intrinsic(replace(quick, base="no-such-base"), Search(dimensions=(20,), **one))
    with pytest.raises(ConfigError, match="2 dimensions are no more than the model's"):
        intrinsic(quick, Search(dimensions=(20, 2), **one))
    assert [point["d"] for point in intrinsic(quick, Search(dimensions=(20,), **one))["curve"]] == [20]


def test_numbers_that_mean_nothing_are_refused() -> None:
    for factor in (0.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="rate_factors must be numbers"):
            Search(rate_factors=(1.0, factor))
    with pytest.raises(ConfigError, match="at least one seed and dimensions"):
        Search(dimensions=())


def test_d90_is_where_the_curve_stays_above() -> None:
    curve = [{"d": d, "score": s} for d, s in ((10, 0.9), (100, 0.4), (1000, 0.85), (10000, 0.95))]
    assert reached(curve, 0.8) == 1000
    assert reached(curve, 0.96) is None
