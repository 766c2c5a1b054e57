"""Starts from data: their directions against decompositions of what was looked at, and whole trainings with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_model, logits
from torch import Tensor

from twofold.adapter.attach import attach, detach, shares
from twofold.adapter.config import LoraConfig, resolve
from twofold.base.batch import Example, pack
from twofold.base.blocks import NotDescribed
from twofold.base.load import load_base
from twofold.errors import ConfigError
from twofold.events import silent
from twofold.layers.linear import LinearShare
from twofold.lowrank.spectral_init import eva_ranks, loftq
from twofold.quant import Scheme
from twofold.recipes.proof import base_digest
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.starts import loftq_start, started
from twofold.recipes.train import dry_run, prepare, train
from twofold.training.loop import train as run_job
from twofold.training.objective import plain_objective

pytest_plugins = ("tiny_fixtures",)
FAMILY = pytest.mark.parametrize("family", ["llama", "gpt2"])
TARGETS = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(4, 64, (n,), generator=generator).tolist() for n in (19, 14, 12, 27)]
    return [Example(r, [i > 2 for i in range(len(r))]) for r in rows]


def inputs_of(model: Any, module: str) -> Tensor:
    """Every row that reaches a module, in float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    for example in examples():
        model(input_ids=torch.tensor([example.token_ids]))
    handle.remove()
    return torch.cat(seen).double()


@FAMILY
def test_eva_starts_along_the_main_directions_of_the_inputs(family: str) -> None:
    model = build_model(family)
    bare, before = logits(model), base_digest(model)
    config, factors = started(
        model, LoraConfig(r=3, target_modules=TARGETS[family], init_lora_weights="eva"), examples(), 0, "unread"
    )
    assert factors is not None
    for module, (A, B) in factors.items():
        directions = torch.linalg.svd(inputs_of(model, module), full_matrices=False).Vh[: len(A)]
        torch.testing.assert_close((A.double() @ directions.T).abs(), torch.eye(len(A)).double(), rtol=1e-3, atol=1e-3)
        assert not B.any()
        assert resolve(config, module).r == len(A)
    assert sum(len(A) for A, _ in factors.values()) == 3 * len(factors)
    attach(model, config, factors=factors)
    assert torch.equal(logits(model), bare)
    assert base_digest(model) == before


def test_ranks_go_where_they_explain_most() -> None:
    flat, steep = torch.full((8,), 1 / 8), torch.tensor([0.9, 0.05, 0.03, 0.02])
    assert eva_ranks({"flat": flat, "steep": steep}, {"flat": 4, "steep": 4}) == {"flat": 7, "steep": 1}
    assert eva_ranks({"flat": flat, "steep": steep}, {"flat": 4, "steep": 4}, rho=1.25) == {"flat": 5, "steep": 3}


@FAMILY
def test_lora_ga_starts_along_the_gradient(family: str) -> None:
    """B along its first left singular vectors and A along the next right ones; the model is the base."""
    model = build_model(family)
    bare, before = logits(model), base_digest(model)
    learns = {n: p.requires_grad for n, p in model.named_parameters()}
    config = LoraConfig(r=2, target_modules=TARGETS[family], init_lora_weights="lora_ga")
    torch.manual_seed(1)
    found, factors = started(model, config, examples(), 0, "unread")
    assert found == config
    assert factors is not None
    assert {n: p.requires_grad for n, p in model.named_parameters()} == learns
    assert all(p.grad is None for p in model.parameters())
    weights = {n: model.get_submodule(n).weight for n in factors}
    loss = plain_objective(model, 0, NotDescribed("asked for"), recompute=False)(pack(examples())).loss_sum
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for (A, B), gradient in zip(factors.values(), gradients, strict=True):
        U, _, Vh = torch.linalg.svd(gradient.T if family == "gpt2" else gradient)
        for ours, theirs in ((B.T, U.T[:2]), (A, Vh[2:4])):
            cosines = torch.nn.functional.normalize(ours, dim=1) @ theirs.T
            torch.testing.assert_close(cosines.abs(), torch.eye(2), rtol=0.02, atol=0.02)
    attach(model, config, factors=factors)
    assert torch.equal(logits(model), bare)
    assert base_digest(model) == before


def roundtrip(weight: Tensor) -> Tensor:
    """Eight levels."""
    step = weight.abs().max() / 4
    return (weight / step).round() * step


def test_loftq_makes_up_for_most_of_what_rounding_took() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 16)
    (A, B), quantised = loftq(weight, roundtrip, 4, 0.5)
    assert torch.equal(quantised, roundtrip(weight))
    lost = torch.linalg.svdvals(weight - quantised)
    left = torch.linalg.svdvals(weight - quantised - 0.5 * B @ A)
    torch.testing.assert_close(left[:12], lost[4:], rtol=1e-3, atol=1e-4)
    (A, B), again = loftq(weight, roundtrip, 4, 0.5, iterations=5)
    assert (weight - again - 0.5 * B @ A).norm() < left.norm()


def test_loftq_over_a_rounded_base_is_nearer_to_the_base_it_came_from() -> None:
    exact, model = build_model("llama"), build_model("llama")
    config = LoraConfig(r=8, init_lora_weights="loftq", target_modules=["q_proj", "up_proj", "down_proj"])
    names = [n for n, _ in exact.named_modules() if n.endswith(tuple(config.target_modules))]
    weights = {n: exact.get_submodule(n).weight.detach() for n in names}
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).weight.copy_(roundtrip(weights[name]))
    off = (logits(model) - logits(exact)).norm()
    attach(model, config, factors=loftq_start(model, config, weights, roundtrip))
    assert (logits(model) - logits(exact)).norm() < 0.8 * off
    assert isinstance(next(iter(shares(model, "default").values())), LinearShare)


VARIANTS: list[dict[str, Any]] = [
    {"init_lora_weights": "eva"},
    {"init_lora_weights": "lora_ga"},
    {"init_lora_weights": "pissa", "use_dora": True},
    {"use_dora": True},
    {"freeze_a": True},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: " ".join(map(str, s.values())))
def test_a_whole_training_is_proved(config: TrainConfig, settings: dict[str, Any]) -> None:
    training = replace(config.training, epochs=2, weight_decay=0.1, learning_rate=0.005)
    report = train(replace(config, adapter=AdapterSettings(r=4, **settings), training=training))
    assert report["evaluation"]["adapter"]["loss"] < report["evaluation"]["base"]["loss"]
    assert report["verification"]["passed"]
    assert report["base_unchanged"]


def test_a_training_with_a_start_from_data_goes_on_after_a_stop(config: TrainConfig, tmp_path: Path) -> None:
    """The start is computed again, and the same."""
    adapter = AdapterSettings(r=4, init_lora_weights="lora_ga", lora_dropout=0.1)
    whole = replace(config, adapter=adapter, training=replace(config.training, checkpoint_every=4, epochs=2))
    undisturbed = train(whole)
    halved = replace(whole, output=str(tmp_path / "halved"))
    run = Path(halved.output)
    train(halved)
    import shutil

    for left in (run / "adapter", run / "adapter-last"):
        shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(run / "checkpoints" / "step-000008")
    (run / "report.json").unlink()
    again = train(halved, resume=True)
    assert again["evaluation"]["adapter"] == undisturbed["evaluation"]["adapter"]


@pytest.mark.parametrize("freeze_a", [False, True], ids=["whole", "frozen A"])
@pytest.mark.parametrize("start", ["lora_ga", "pissa"])
def test_a_training_goes_on_from_its_own_start_where_another_would_be_computed(
    config: TrainConfig, start: str, freeze_a: bool
) -> None:
    """Decompositions are unique up to signs, which another machine or number of threads may choose otherwise."""
    adapter = AdapterSettings(r=4, init_lora_weights=start, freeze_a=freeze_a)
    halved = replace(config, adapter=adapter, training=replace(config.training, checkpoint_every=4, epochs=2))
    _, _, whole = prepare(halved)
    run_job(whole, silent)
    base, _, resumed = prepare(halved)
    with torch.no_grad():
        for share in shares(base.model, "default").values():
            for tensor in share.state_dict().values():
                tensor.neg_()
    run_job(resumed, silent, whole.checkpoints / "step-000004")
    assert all(torch.equal(p, whole.parameters[n]) for n, p in resumed.parameters.items())
    batch = whole.batches(0)[0]
    assert torch.equal(resumed.objective(batch).loss_sum, whole.objective(batch).loss_sum)


@pytest.mark.parametrize("which", ["llama_base", "gpt2_base"])
def test_loftq_over_a_packed_base_takes_the_best_of_what_packing_lost(
    which: str, request: pytest.FixtureRequest
) -> None:
    """Against the decomposition in float64 of each weight of the checkpoint less what its codes stand for."""
    folder = str(request.getfixturevalue(which))
    exact, model = (load_base(folder, "float32", "cpu", quantization=s).model for s in (None, Scheme("nf4")))
    config = LoraConfig(r=8, lora_alpha=5, init_lora_weights="loftq")
    before = base_digest(model)
    lora, factors = started(model, config, [], 0, folder)
    attach(model, lora, factors=factors)
    assert len(shares(model, "default")) > 4
    for module, share in shares(model, "default").items():
        assert isinstance(share, LinearShare)
        layer, source = model.get_submodule(module), exact.get_submodule(module)
        dense = source.weight.detach().double()
        lost = (dense.T if which == "gpt2_base" else dense) - layer.matrix()
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        best = (U[:, :8] * S[:8]) @ Vh[:8]
        torch.testing.assert_close((share.scale * share.B @ share.A).double(), best, rtol=1e-3, atol=1e-5)
    adapted = logits(model)
    detach(model)
    assert base_digest(model) == before
    assert (adapted - logits(exact)).norm() < (logits(model) - logits(exact)).norm()


def test_a_training_that_starts_with_loftq(config: TrainConfig) -> None:
    adapter = AdapterSettings(r=4, init_lora_weights="loftq")
    report = train(replace(config, adapter=adapter, quantization="nf4"))
    assert report["evaluation"]["adapter"]["loss"] < 0.7 * report["evaluation"]["base"]["loss"]
    assert report["verification"]["passed"]
    assert report["base_unchanged"]


def test_loftq_is_not_for_a_base_that_is_not_quantised(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="this base is not quantised; set quantization: nf4"):
        train(replace(config, adapter=AdapterSettings(r=4, init_lora_weights="loftq")))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_lora_ga_is_not_for_packed_weights(config: TrainConfig, quantization: Any) -> None:
    packed = replace(config, adapter=AdapterSettings(r=4, init_lora_weights="lora_ga"), quantization=quantization)
    for begin in (dry_run, train):
        with pytest.raises(ConfigError, match="the gradient of the weights, which packed ones do not have"):
            begin(packed)
    assert not Path(config.output).exists(), "a configuration that can be mended leaves no folder in the way"


def test_a_start_of_too_many_directions_names_the_module_and_why() -> None:
    config = LoraConfig(r=17, target_modules=["q_proj"], init_lora_weights="lora_ga")
    with pytest.raises(
        ConfigError, match=r"takes 34 directions \(2 r, and r is 17\) out of '.*q_proj', which has but 32"
    ):
        started(build_model("llama"), config, examples(), 0, "unread")


def test_lora_plus_and_a_frozen_a_contradict_each_other(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="A does not learn at all"):
        replace(
            config,
            adapter=AdapterSettings(freeze_a=True),
            training=replace(config.training, loraplus_lr_ratio=16.0),
        )
