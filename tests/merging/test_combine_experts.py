"""Adapters of stacked experts combined and resized on disk: against dense sums expert by expert, and against the live model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import GROUPED, logits, randomise
from tiny_adapters import learned
from torch import Tensor

import twofold
from twofold.adapter.attach import activate, attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, open_adapter, save_adapter
from twofold.adapter.updates import updates_of
from twofold.errors import AdapterFileError, ConfigError
from twofold.merging.methods import METHODS
from twofold.merging.resize import Size
from twofold.recipes.inspect import inspect_adapter
from twofold.recipes.resize import resize

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STACKED: dict[str, Any] = {"r": 3, "lora_alpha": 4, "target_modules": [], "target_parameters": EXPERTS}
VARIANTS: dict[str, dict[str, Any]] = {
    "experts": STACKED,
    "rslora": {**STACKED, "use_rslora": True},
    "one parameter": {**STACKED, "target_parameters": EXPERTS[1:]},
    "with modules": {**STACKED, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 5}},
    "a matrix alone": {**STACKED, "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    "patterns": {**STACKED, "rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {"down_proj": 9}},
}


def mixture() -> Any:
    config: Any = hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return hf.MixtralForCausalLM(config).eval()


def saved(path: Path, seed: int = 11, **settings: Any) -> Path:
    model = mixture()
    attach(model, LoraConfig(**settings))
    randomise(learned(model), seed=seed)
    return save_adapter(model, path)


def dense(path: Path) -> dict[str, Tensor]:
    return {n: u.scale * u.B.double() @ u.A.double() for n, u in updates_of(open_adapter(path)).items()}


def said(*adapters: tuple[Path, float]) -> Tensor:
    """The logits of the model with these adapters at these weights."""
    model = mixture()
    for i, (path, _) in enumerate(adapters):
        load_adapter(model, path, f"{i}")
    activate(model, {f"{i}": weight for i, (_, weight) in enumerate(adapters)})
    with torch.no_grad():
        return logits(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_adapter_stays_what_it_is(variant: str, method: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a", **VARIANTS[variant])
    found = twofold.combine({path: 1.0}, tmp_path / "out", method=method)
    assert found["lost"] == pytest.approx(0, abs=1e-9)
    before, after = dense(path), dense(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all((after[n] - before[n]).norm() <= 1e-6 * before[n].norm() for n in before)
    torch.testing.assert_close(said((tmp_path / "out", 1.0)), said((path, 1.0)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("second", ["experts", "rslora", "patterns"])
def test_cat_is_the_weighted_sum(second: str, tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", **STACKED), saved(tmp_path / "b", 12, **{**VARIANTS[second], "r": 2})
    twofold.combine({a: 0.7, b: -1.5}, tmp_path / "out")
    one, two, found = dense(a), dense(b), dense(tmp_path / "out")
    assert len(found) == 2 * 2 * 4
    for name, delta in found.items():
        expected = 0.7 * one[name] - 1.5 * two[name]
        assert (delta - expected).norm() <= 1e-6 * expected.norm()
    torch.testing.assert_close(said((tmp_path / "out", 1.0)), said((a, 0.7), (b, -1.5)), rtol=1e-4, atol=1e-4)


def test_svd_is_the_best_of_its_rank_for_every_expert(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", **STACKED), saved(tmp_path / "b", 12, **STACKED)
    told = twofold.combine({a: 0.5, b: 0.5}, tmp_path / "out", method="svd", r=4)
    one, two, found = dense(a), dense(b), dense(tmp_path / "out")
    lost = had = 0.0
    for name, delta in found.items():
        total = (one[name] + two[name]) / 2
        best = torch.linalg.svdvals(total)[4:].square().sum()
        assert float((total - delta).norm() ** 2) == pytest.approx(float(best), rel=1e-4)
        lost, had = lost + float(best), had + float(total.norm()) ** 2
    assert told["lost"] == pytest.approx(lost / had, rel=1e-4)
    assert {len(u.A) for u in updates_of(open_adapter(tmp_path / "out")).values()} == {4}


def test_experts_beside_an_adapter_of_modules(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", **STACKED), saved(tmp_path / "b", 12, r=2, target_modules=["q_proj", "v_proj"])
    twofold.combine({a: 1.0, b: 0.5}, tmp_path / "out")
    torch.testing.assert_close(said((tmp_path / "out", 1.0)), said((a, 1.0), (b, 0.5)), rtol=1e-4, atol=1e-4)


def test_biases_of_b_do_not_go_with_experts(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", **STACKED), saved(tmp_path / "b", r=2, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ConfigError, match=r"experts.*is no linear layer.*\(lora_bias\)"):
        twofold.combine({a: 1.0, b: 1.0}, tmp_path / "out")


def test_other_parameters_of_one_module_are_refused(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", **STACKED), saved(tmp_path / "b", 12, **VARIANTS["one parameter"])
    with pytest.raises(ConfigError, match=r"they adapt different parameters of 'model.layers.0.mlp.experts'"):
        twofold.combine({a: 1.0, b: 1.0}, tmp_path / "out")


@pytest.mark.parametrize(
    "entries", [EXPERTS, EXPERTS[::-1], ["down_proj", "gate_up_proj"]], ids=["as made", "turned", "endings"]
)
def test_the_order_in_the_config_says_nothing(entries: list[str], tmp_path: Path) -> None:
    """PEFT writes `target_parameters` as they come out of a set, and the tensors in the module's order."""
    model = mixture()
    loud = {"alpha_pattern": {"mlp.experts.down_proj": 40}}
    targets = LoraConfig(**{**STACKED, "target_modules": ["q_proj"], "target_parameters": entries, **loud})
    attach(model, targets)
    randomise(learned(model))
    path = save_adapter(model, tmp_path / "a")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": entries}))
    twofold.combine({path: 1.0}, tmp_path / "out")
    resize(path, tmp_path / "same", Size(r=3))
    with torch.no_grad():
        expected = logits(model)
    for made in ("out", "same"):
        torch.testing.assert_close(said((tmp_path / made, 1.0)), expected, rtol=1e-5, atol=1e-5)
    other = saved(tmp_path / "b", 12, **{**STACKED, "target_modules": ["q_proj"]})
    twofold.combine({path: 0.5, other: 2.0}, tmp_path / "both")
    torch.testing.assert_close(said((tmp_path / "both", 1.0)), said((path, 0.5), (other, 2.0)), rtol=1e-4, atol=1e-4)


def test_parameters_of_unknown_names_are_told_apart_by_rank_alone(tmp_path: Path) -> None:
    names = ["mlp.experts.later", "mlp.experts.earlier"]

    def renamed(path: Path, ranks: dict[str, int]) -> Path:
        config = json.loads((path / "adapter_config.json").read_text())
        told = {**config, "target_parameters": names, "rank_pattern": ranks, "alpha_pattern": {}}
        (path / "adapter_config.json").write_text(json.dumps(told))
        return path

    alike = renamed(saved(tmp_path / "a", **STACKED), {})
    for work in (
        lambda: twofold.combine({alike: 1.0}, tmp_path / "out"),
        lambda: resize(alike, tmp_path / "out", Size(r=1)),
    ):
        with pytest.raises(
            AdapterFileError, match=r"nothing tells which factors of 'model\.layers\.0\.mlp\.experts' are of which"
        ):
            work()
    assert {f.code for f in inspect_adapter(alike).findings if f.severity == "error"} == {"rank-mismatch"}
    ranks = {"rank_pattern": {"gate_up_proj": 2}}
    distinct = renamed(saved(tmp_path / "b", **{**STACKED, **ranks}), {"earlier": 2})
    deltas = dense(distinct)
    assert deltas["model.layers.0.mlp.experts.earlier[0]"].shape == (96, 32)
    assert deltas["model.layers.0.mlp.experts.later[0]"].shape == (32, 48)


def test_resizing_keeps_the_best_of_every_expert(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", **{**STACKED, "r": 6})
    resize(path, tmp_path / "out", Size(r=2))
    before, after = dense(path), dense(tmp_path / "out")
    for name, delta in before.items():
        best = float(torch.linalg.svdvals(delta)[2:].norm())
        assert float((delta - after[name]).norm()) == pytest.approx(best, rel=1e-4)
    model = mixture()
    load_adapter(model, tmp_path / "out")
