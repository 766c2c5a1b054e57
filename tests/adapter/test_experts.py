"""Stacked experts of mixtures: against weights merged by hand, against PEFT, in every way that transformers runs them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import GROUPED, build_model, logits, randomise, token_ids
from safetensors.torch import load_file
from tiny_adapters import learned
from torch import Tensor, nn

from twofold.adapter.attach import (
    activate,
    attach,
    detach,
    disabled,
    folding,
    merge,
    shares,
    trainable_summary,
    unmerge,
)
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, open_adapter, save_adapter
from twofold.adapter.shapes import module_shapes
from twofold.errors import ConfigError, TargetError
from twofold.inspection.report import report_adapter
from twofold.lowrank.standin import StandIn, Sum
from twofold.merging.checkpoint import merged_state
from twofold.planning.parameters import plan_parameters

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WAYS = pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])


def mixture(family: str = "mixtral", way: str = "eager") -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if family == "mixtral":
            config: Any = hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
        else:
            config = hf.Qwen3MoeConfig(
                **GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
            )
        config._experts_implementation = way
        config.initializer_range = 0.2
        return hf.AutoModelForCausalLM.from_config(config).eval()


def run(model: Any) -> Tensor:
    found: Tensor = model(input_ids=token_ids(2, 7)).logits
    return found


def settings(**more: Any) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 4, "target_modules": [], "target_parameters": EXPERTS, **more}


def adapted(family: str = "mixtral", way: str = "eager", **more: Any) -> Any:
    model = mixture(family, way)
    attach(model, LoraConfig(**settings(**more)))
    randomise(learned(model))
    return model


def by_hand(model: Any, family: str, way: str, scale: float = 4 / 3) -> Any:
    """A bare model whose experts' weights are W + scale · B A, expert by expert."""
    bare = mixture(family, way)
    with torch.no_grad():
        for module, share in shares(model, "default").items():
            for name in getattr(share, "names", ()):
                found: Any = share.of(name)  # type: ignore[operator]
                weight = bare.get_submodule(module).get_parameter(name)
                for expert in range(len(found.A)):
                    weight[expert] += scale * found.B[expert] @ found.A[expert]
    return bare


@WAYS
@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
def test_forward_and_merging_are_those_of_weights_merged_by_hand(family: str, way: str) -> None:
    bits = {n: p.clone() for n, p in mixture(family, way).named_parameters()}
    model = adapted(family, way)
    expected = run(by_hand(model, family, way))
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(mixture(family, way)), expected, atol=1e-2)
    with folding(model):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    merge(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    unmerge(model)
    bare = mixture(family, way)
    bare.load_state_dict(merged_state(model))
    torch.testing.assert_close(run(bare), expected, rtol=1e-4, atol=1e-4)
    with disabled(model):
        assert torch.equal(run(model), run(mixture(family, way)))
    detach(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


@WAYS
def test_the_start_changes_nothing_and_no_large_sum_is_formed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(way=way)
    before = run(model)
    planned = plan_parameters(LoraConfig(**settings()), module_shapes(model), 1).trainable
    assert attach(model, LoraConfig(**settings())).trainable == planned == 2 * 4 * 3 * (32 + 96 + 48 + 32)

    def never(_: Sum) -> Tensor:
        raise AssertionError("a sum was formed")

    monkeypatch.setattr(Sum, "formed", never)
    assert torch.equal(run(model), before)
    run(model).sum().backward()


@WAYS
def test_gradients_are_those_of_the_formula(way: str) -> None:
    wide = torch.float32 if way == "grouped_mm" else torch.float64  # torch has no grouped product of float64
    model = adapted(way=way).to(wide)
    run(model).square().mean().backward()
    expected = by_hand(adapted(), "mixtral", way).to(wide)
    for parameter in expected.parameters():
        parameter.requires_grad_(True)
    run(expected).square().mean().backward()
    for module, share in shares(model, "default").items():
        found: Any = share
        for name in found.names:
            whole, factors = expected.get_submodule(module).get_parameter(name).grad, found.of(name)
            ours = [(f.grad / (4 / 3)) for f in (factors.A, factors.B)]
            theirs = [factors.B.mT @ whole, whole @ factors.A.mT]
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


CASES: list[dict[str, Any]] = [
    {},
    {"target_parameters": EXPERTS[:1], "use_rslora": True},
    {"target_parameters": EXPERTS[1:], "target_modules": ["q_proj"]},
    {
        "target_parameters": [*EXPERTS, "mlp.gate.weight"],
        "rank_pattern": {"down_proj": 5},
        "alpha_pattern": {"weight": 7},
    },
]


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
@pytest.mark.parametrize("case", CASES, ids=["both", "one", "with modules", "patterns and router"])
def test_files_of_peft_and_ours_are_the_same_adapter(family: str, case: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(mixture(family), peft.LoraConfig(**settings(**case))).eval()
    randomise([(n, p) for n, p in theirs.named_parameters() if p.requires_grad])
    expected = run(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mixture(family)
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(run(ours), expected, rtol=1e-4, atol=1e-4)
    save_adapter(ours, tmp_path / "ours")
    files = [load_file(tmp_path / w / "adapter_model.safetensors") for w in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    back = peft.PeftModel.from_pretrained(mixture(family), tmp_path / "ours").eval()
    torch.testing.assert_close(run(back), expected, rtol=1e-4, atol=1e-4)


def test_several_adapters_add_up_by_their_weights() -> None:
    model = adapted()
    attach(model, LoraConfig(**settings(r=2, target_parameters=EXPERTS[:1])), "second")
    randomise([(n, p) for n, p in learned(model)], seed=5)
    activate(model, {"default": 0.5, "second": -2.0})
    layer = model.model.layers[0].mlp.experts
    one, two = (layer.shares[n].of("gate_up_proj") for n in ("default", "second"))
    expected = 0.5 * 4 / 3 * one.B @ one.A - 2.0 * 2 * two.B @ two.A
    torch.testing.assert_close(layer.delta("gate_up_proj"), expected)
    found = run(model)
    merge(model)
    torch.testing.assert_close(run(model), found, rtol=1e-4, atol=1e-4)


def test_the_stand_in_is_exact_in_what_it_does_not_know() -> None:
    torch.manual_seed(0)
    weight, left, right = torch.randn(3, 4, 5), torch.randn(3, 4, 2), torch.randn(3, 2, 5)
    standing, whole, x = StandIn.of(Sum(weight, left, right)), weight + left @ right, torch.randn(3, 6, 4)
    uses: list[Any] = [
        lambda w: torch.einsum("bio,bti->bto", w, x),
        lambda w: torch.bmm(x, w),
        lambda w: w.transpose(1, 2)[1] @ x[1].mT,
        lambda w: F.linear(x[0], w[0].mT, torch.ones(5)),
        lambda w: w[torch.tensor([2, 0])].sum(0),
        lambda w: w[:, 1:3],
        lambda w: w[0, 1],
        lambda w: w + 1,
        lambda w: torch.cat([w, w]),
        lambda w: w.exp(),
    ]
    for use in uses:
        torch.testing.assert_close(use(standing) + 0.0, use(whole) + 0.0)


def test_bfloat16_and_a_weight_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).bfloat16()
    attach(model, LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["0.weight"]))
    randomise(learned(model))
    factors: Any = model[0].shares["default"].of("weight")  # type: ignore[union-attr]
    assert factors.A.dtype is torch.float32
    x = torch.randn(5, 4).bfloat16()
    base: Any = model[0].base
    expected = torch.tanh(F.linear(x.float(), base.weight.float() + factors.B[0] @ factors.A[0], base.bias.float()))
    torch.testing.assert_close(model(x).float(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_bias_beside_an_adapted_parameter_learns_as_in_peft(bias: Any, tmp_path: Path) -> None:
    asked = settings(target_modules=["q_proj", "fc1"], target_parameters=["fc2.weight"], bias=bias)
    theirs = peft.get_peft_model(build_model("opt"), peft.LoraConfig(**asked)).eval()
    randomise([(n, p) for n, p in theirs.named_parameters() if p.requires_grad], scale=0.1)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, bare = build_model("opt"), build_model("opt")
    planned = plan_parameters(LoraConfig(**asked), module_shapes(ours), 1).trainable
    load_adapter(ours, tmp_path / "theirs")
    assert trainable_summary(ours).trainable == planned == theirs.get_nb_trainable_parameters()[0]
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    with folding(ours):
        torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    bare.load_state_dict(merged_state(ours))
    torch.testing.assert_close(logits(bare), expected, rtol=1e-5, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    files = [load_file(tmp_path / w / "adapter_model.safetensors") for w in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        torch.testing.assert_close(files[1][key], tensor)


def test_a_file_that_changes_one_module_twice_is_refused(tmp_path: Path) -> None:
    model = build_model("opt")
    attach(model, LoraConfig(**settings(target_parameters=["fc2.weight"])))
    config = save_adapter(model, tmp_path / "a") / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": ["fc2"]}))
    with pytest.raises(ConfigError, match=r"changes .*fc2. in one way"):
        load_adapter(build_model("opt"), tmp_path / "a")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"target_parameters": ["experts.gate_up"]}, TargetError, "did you mean 'experts.gate_up_proj'"),
        ({"target_parameters": ["input_layernorm.weight"]}, TargetError, "no parameter of two or three dimensions"),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]},
            TargetError,
            "in both target_modules and target_parameters",
        ),
        (
            {"modules_to_save": ["mlp"]},
            TargetError,
            "'model.layers.0.mlp.experts' is in target_parameters, but modules_to_save trains 'model.layers.0.mlp' whole",
        ),
        ({"lora_dropout": 0.1}, ConfigError, "lora_dropout cannot fall"),
        ({"use_dora": True}, ConfigError, "use_dora is defined for linear layers, embeddings and"),
        ({"init_lora_weights": "pissa"}, ConfigError, "pissa is defined for linear layers alone"),
    ],
)
def test_what_makes_no_sense_is_refused(more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attach(mixture(), LoraConfig(**settings(**more)))


def test_training_a_mixture_lowers_its_loss() -> None:
    model, ids = adapted(), token_ids(2, 9)
    optimiser = torch.optim.Adam([p for _, p in learned(model)], lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    assert math.isfinite(losses[-1])


PATTERNS: list[dict[str, Any]] = [
    {},
    {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"gate_up_proj": 7}},
    {"rank_pattern": {"down_proj": 6}, "target_parameters": [*EXPERTS[::-1], "mlp.gate.weight"]},
    {"target_parameters": EXPERTS[1:], "target_modules": ["q_proj"], "rank_pattern": {"down_proj": 2}},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=["none", "ranks and alphas", "other order and a router", "one"])
def test_inspection_knows_each_experts_rank_and_scale(pattern: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**pattern)
    report = report_adapter(open_adapter(save_adapter(model, tmp_path / "a")))
    expected = {}
    for module, share in shares(model, "default").items():
        held: Any = share
        for name in getattr(share, "names", ()):
            factors, scale = held.of(name), held.scales[name]
            norms = (scale * factors.B @ factors.A).flatten(1).norm(dim=1).tolist()
            names = [f"{module}.{name}"] if len(norms) == 1 else [f"{module}.{name}[{e}]" for e in range(len(norms))]
            expected |= {n: (factors.A.shape[1], scale, norm) for n, norm in zip(names, norms, strict=True)}
        if not hasattr(share, "names"):
            expected[module] = (len(held.A), held.scale, (held.scale * held.B @ held.A).norm().item())
    found = {m.name: (m.r, m.scale, m.frobenius_norm) for m in report.modules}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name
