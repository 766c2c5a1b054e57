"""Variants of LoRA on whole models: both paths, the bits at step 0, the base's bytes, files, merging, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_model, logits, randomise
from torch import Tensor, nn

from twofold.adapter.attach import activate, attach, detach, merge, shares, unmerge
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, save_adapter
from twofold.base.batch import Example, pack
from twofold.base.blocks import Decoder, NotDescribed, describe
from twofold.errors import ConfigError
from twofold.layers.linear import LinearShare, cast_once
from twofold.merging.checkpoint import merged_state
from twofold.recipes.proof import base_digest
from twofold.training.objective import FastObjective, plain_objective

VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora and bias": {"use_dora": True, "bias": "lora_only"},
    "dora and pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "dora, frozen A": {"use_dora": True, "freeze_a": True},
    "lora_bias": {"lora_bias": True},
    "false": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "fast pissa": {"init_lora_weights": "pissa_niter_4"},
    "olora and rslora": {"init_lora_weights": "olora", "use_rslora": True},
    "frozen A": {"freeze_a": True},
    "frozen A and pissa": {"freeze_a": True, "init_lora_weights": "pissa"},
}
EVERY = pytest.mark.parametrize("name", VARIANTS)
FAMILY = pytest.mark.parametrize("family", ["llama-tied", "phi3"])


def adapted(name: str, family: str = "llama-tied", *, moved: bool = True) -> Any:
    """A model with that variant; `moved` as if it had learned."""
    model = build_model(family)
    torch.manual_seed(5)
    attach(model, LoraConfig(r=4, lora_alpha=6, rank_pattern={r"0\..*": 2}, **VARIANTS[name]))
    if moved:
        move(model)
    return model


@torch.no_grad()
def move(model: nn.Module) -> None:
    before = {n: p.clone() for n, p in learned(model).items()}
    randomise(list(learned(model).items()), scale=0.1)
    for n, p in learned(model).items():
        p.add_(before[n])


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def batch() -> Any:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(4, 64, (n,), generator=generator).tolist() for n in (9, 4, 12, 7)]
    return pack([Example(r, [i > 2 for i in range(len(r))]) for r in rows])


def fast(model: Any) -> FastObjective:
    described = describe(model)
    assert isinstance(described, Decoder), described
    return FastObjective(described, recompute=False)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(learned(model), torch.autograd.grad(loss, list(learned(model).values())), strict=True))


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative distance of a gradient; of one that is next to nothing, as that of k's bias, to the largest."""
    floor = 1e-2 * max(float(g.norm()) for g in expected.values())
    return max(float((found[n] - g).norm()) / max(float(g.norm()), floor) for n, g in expected.items())


@EVERY
@FAMILY
def test_fast_and_plain_paths_agree(name: str, family: str) -> None:
    model = adapted(name, family)
    quick = fast(model)(batch()).loss_sum
    slow = plain_objective(model, 0, NotDescribed("asked for"), recompute=False)(batch()).loss_sum
    torch.testing.assert_close(quick, slow, rtol=1e-5, atol=0)
    found, expected = gradients(model, quick), gradients(model, slow)
    assert distance(found, expected) < 1e-5
    with cast_once(model):
        once = fast(model)(batch()).loss_sum
        torch.testing.assert_close(once, quick, rtol=1e-6, atol=0)
        assert distance(gradients(model, once), found) < 1e-5


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "false"])
def test_step_0_is_the_base(name: str) -> None:
    """Bit for bit, but for DoRA beside a bias, which is added after the product, and orthogonal factors, whose product rounds."""
    model = build_model("llama-tied")
    bare = logits(model)
    torch.manual_seed(5)
    attach(model, LoraConfig(r=4, **VARIANTS[name]))
    if "dora" in name or name == "orthogonal":
        torch.testing.assert_close(logits(model), bare, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(logits(model), bare)
    without_biases = build_model("llama")
    bare = logits(without_biases)
    attach(without_biases, LoraConfig(r=4, **VARIANTS[name]))
    if name != "orthogonal":
        assert torch.equal(logits(without_biases), bare)


@EVERY
def test_training_leaves_the_base_alone(name: str) -> None:
    model = build_model("llama")
    before, bare = base_digest(model), logits(model)
    attach(model, LoraConfig(r=4, **VARIANTS[name]))
    optimise = torch.optim.AdamW(learned(model).values(), lr=0.004)
    losses = []
    for _ in range(4):
        loss = fast(model)(batch()).loss_sum
        losses.append(float(loss.detach()))
        loss.backward()
        optimise.step()
        optimise.zero_grad()
    assert losses[-1] < losses[0]
    assert base_digest(model) == before
    detach(model)
    assert base_digest(model) == before
    assert torch.equal(logits(model), bare)


@EVERY
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_merging_keeps_the_outputs_and_unmerging_the_bits(name: str, family: str) -> None:
    model = adapted(name, family)
    apart = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), apart, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model), apart)
    if family == "gpt2" or name != "lora_bias":
        bare = build_model(family)
        bare.load_state_dict(merged_state(model))
        torch.testing.assert_close(logits(bare), apart, rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_saved_and_loaded_it_says_the_same(name: str, family: str, tmp_path: Path) -> None:
    model = adapted(name, family)
    save_adapter(model, tmp_path / "a")
    other = build_model(family)
    files = load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    assert files.config.use_dora is VARIANTS[name].get("use_dora", False)
    assert files.config.init_lora_weights is True


@EVERY
def test_bfloat16_stays_near_float32(name: str) -> None:
    """Factors in float32 over a bfloat16 base, on both paths."""
    model = build_model("llama").to(torch.bfloat16)
    torch.manual_seed(5)
    attach(model, LoraConfig(r=4, lora_alpha=6, **VARIANTS[name]))
    move(model)
    assert {p.dtype for p in learned(model).values()} == {torch.float32}
    wide = build_model("llama").to(torch.bfloat16).float()
    torch.manual_seed(5)
    attach(wide, LoraConfig(r=4, lora_alpha=6, **VARIANTS[name]))
    move(wide)
    truth = fast(wide)(batch()).loss_sum
    for objective in (fast(model), plain_objective(model, 0, NotDescribed("asked for"), recompute=False)):
        loss = objective(batch()).loss_sum
        torch.testing.assert_close(loss, truth, rtol=0.01, atol=0)
        assert distance(gradients(model, loss), gradients(wide, fast(wide)(batch()).loss_sum)) < 0.15


def test_the_rows_of_a_dora_weight_have_the_learned_lengths() -> None:
    """Merged weights against the paper's formula, from BA formed in full, in float64."""
    model = adapted("dora").double()
    for module, share in shares(model, "default").items():
        assert isinstance(share, LinearShare)
        assert share.magnitude is not None
        layer = model.get_submodule(module)
        whole = layer.base.weight + share.scale * share.B @ share.A
        expected = share.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer.fold(), expected.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(layer.delta(), (expected - layer.base.weight).detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.fold().norm(dim=1), share.magnitude.detach().abs(), rtol=1e-6, atol=1e-7)


def test_a_zero_row_of_the_base_is_no_nan() -> None:
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[1].zero_()
    bare = logits(model)
    attach(model, LoraConfig(r=4, use_dora=True))
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("weights", [{"a": 0.5}, {"a": 1.0, "b": 1.0}])
def test_dora_is_neither_scaled_nor_summed(weights: dict[str, float]) -> None:
    model = build_model("llama")
    attach(model, LoraConfig(r=4, use_dora=True), "a")
    attach(model, LoraConfig(r=4), "b")
    with pytest.raises(ConfigError, match="'a' is DoRA"):
        activate(model, weights)
    activate(model, {"b": 0.5})


def test_a_start_from_the_weight_is_its_largest_part() -> None:
    model = adapted("pissa", moved=False)
    for module, share in shares(model, "default").items():
        assert isinstance(share, LinearShare)
        weight = model.get_submodule(module).base.weight.double()
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        r = len(share.A)
        best = (U[:, :r] * S[:r]) @ Vh[:r]
        torch.testing.assert_close((share.scale * share.B @ share.A).double(), best, rtol=1e-4, atol=1e-5)
        assert not model.get_submodule(module).delta().any()


def test_frozen_factors_do_not_learn_and_are_not_counted() -> None:
    model = build_model("llama")
    summary = attach(model, LoraConfig(r=4, freeze_a=True, target_modules=["q_proj"]))
    assert summary.trainable == 2 * 32 * 4
    activate(model, "default")
    assert not [n for n in learned(model) if n.endswith(".A")]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True, "lora_bias": True}, "use_dora cannot go with lora_bias"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias is only defined for"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "every rank must be even"),
        ({"init_lora_weights": "pisa"}, "may be true, false, gaussian, orthogonal, pissa"),
    ],
)
def test_what_cannot_go_together_is_refused_by_the_config(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoraConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True, "target_parameters": ["lm_head.weight"]}, r"use_dora is defined for .*'lm_head.weight'"),
        ({"lora_bias": True}, "lora_bias is defined for linear layers alone"),
        ({"freeze_a": True}, "freeze_a is defined for linear layers alone"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa is defined"),
        ({"init_lora_weights": "eva", "target_modules": ["q_proj"]}, "no factors were given for"),
        (
            {"init_lora_weights": "olora", "r": 17, "target_modules": ["k_proj"]},
            r"olora takes 17 directions out of '.*k_proj', which has but 16",
        ),
    ],
)
def test_what_a_module_cannot_do_is_refused_and_nothing_is_attached(settings: dict[str, Any], said: str) -> None:
    model = build_model("llama")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=said):
        attach(model, LoraConfig(**{"target_modules": ["q_proj", "embed_tokens"], **settings}))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_a_bias_where_the_model_has_none_is_not_written_into_it(tmp_path: Path) -> None:
    model = build_model("llama")
    attach(model, LoraConfig(r=4, lora_bias=True))
    with pytest.raises(ConfigError, match="cannot be merged into its files"):
        merged_state(model)
