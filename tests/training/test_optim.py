"""Rates and decay of what learns: LoRA+ and the update's own weight decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build_model, randomise
from torch import nn

from twofold.adapter.attach import adapter_layers, attach, shares
from twofold.adapter.config import LoraConfig
from twofold.errors import ConfigError
from twofold.layers.embedding import EmbeddingShare
from twofold.layers.experts import LoraParameters, ParametersShare
from twofold.training.optim import TrainingConfig, optimiser, set_rate

RATE, DECAY = 0.1, 0.5
TARGETS = ["q_proj", "down_proj"]


def adapted(*, moved: float = 0.2, **settings: Any) -> Any:
    model = build_model("llama")
    torch.manual_seed(2)
    attach(model, LoraConfig(r=4, lora_alpha=6, **{"target_modules": TARGETS, **settings}))
    before = {n: p.detach().clone() for n, p in learned(model)}
    randomise(learned(model), scale=moved)
    with torch.no_grad():
        for n, p in learned(model):
            p.add_(before[n])
    return model.double()


def learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def step(model: nn.Module, config: TrainingConfig, gradient: float) -> None:
    """One step in which every value has the same gradient, at a tenth of the rate."""
    optimise = optimiser(model, config)
    set_rate(optimise, config.learning_rate / 10)
    for _, p in learned(model):
        p.grad = torch.full_like(p, gradient)
    optimise.step()


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, layer in adapter_layers(model):
        if isinstance(layer, LoraParameters):
            found |= {f"{name}.{own}": layer.delta(own) for own in layer.changed()}
        else:
            found[name] = layer.delta()  # type: ignore[operator]
    return found


OF_PARAMETERS = {"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]}


@pytest.mark.parametrize("settings", [{"lora_bias": True}, OF_PARAMETERS], ids=["linear", "parameters"])
def test_b_learns_faster_than_a_by_the_ratio(settings: dict[str, Any]) -> None:
    """Adam's first step moves every value by the rate."""
    model = adapted(**settings)
    before = {n: p.detach().clone() for n, p in learned(model)}
    step(model, TrainingConfig(learning_rate=RATE, loraplus_lr_ratio=16.0), 1.0)
    for name, p in learned(model):
        moved = 16 * RATE / 10 if name.endswith((".B", ".b_bias")) else RATE / 10
        torch.testing.assert_close(before[name] - p, torch.full_like(p, moved), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize(
    "settings",
    [{}, {"freeze_a": True}, {"target_modules": ["q_proj", "embed_tokens"]}, {"lora_bias": True}, OF_PARAMETERS],
    ids=["plain", "frozen A", "embedding", "lora_bias", "parameters"],
)
def test_decay_takes_its_share_off_the_update_and_nothing_else(settings: dict[str, Any], ratio: float) -> None:
    """With no gradient, a step multiplies the update by 1 − lr·λ; what carries no update stays as it is."""
    model = adapted(**settings)
    before, kept = deltas(model), {n: p.detach().clone() for n, p in learned(model)}
    step(model, TrainingConfig(learning_rate=RATE, weight_decay=DECAY, loraplus_lr_ratio=ratio), 0.0)
    for name, delta in deltas(model).items():
        torch.testing.assert_close(delta, before[name] * (1 - RATE / 10 * DECAY), rtol=1e-6, atol=1e-9)
    for share in shares(model, "default").values():
        factors = share.factors[0] if isinstance(share, ParametersShare) else share
        still = factors.B if isinstance(share, EmbeddingShare) else factors.A
        assert any(still is p and torch.equal(p, kept[n]) for n, p in learned(model)) or settings.get("freeze_a")
    for name, p in learned(model):
        assert p.dim() > 1 or torch.equal(p, kept[name])


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_the_lengths_of_dora_do_not_decay(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8) if name == "linear" else nn.Conv2d(3, 8, 3))
    attach(model, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    (lengths,) = (p for n, p in learned(model) if n.endswith("magnitude"))
    before = lengths.detach().clone()
    step(model, TrainingConfig(learning_rate=RATE, weight_decay=DECAY), 0.0)
    assert torch.equal(lengths, before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_decay_goes_back_to_the_start_that_the_update_is_counted_from(start: str) -> None:
    fresh = adapted(moved=0.0, init_lora_weights=start)
    step(fresh, TrainingConfig(learning_rate=RATE, weight_decay=DECAY), 0.0)
    assert not any(d.any() for d in deltas(fresh).values())
    model = adapted(moved=1e-4, init_lora_weights=start)
    before = deltas(model)
    step(model, TrainingConfig(learning_rate=RATE, weight_decay=DECAY, loraplus_lr_ratio=4.0), 0.0)
    for name, delta in deltas(model).items():
        expected = before[name] * (1 - RATE / 10 * DECAY)
        assert (delta - expected).norm() < 1e-2 * (before[name] - expected).norm()


def test_without_decay_no_factor_is_touched_but_by_its_gradient() -> None:
    model = adapted(use_dora=True)
    before = {n: p.detach().clone() for n, p in learned(model)}
    step(model, TrainingConfig(learning_rate=RATE), 0.0)
    assert all(torch.equal(p, before[n]) for n, p in learned(model))


@pytest.mark.parametrize("seed", [-1, 2**50])
def test_a_seed_that_some_generator_would_not_take_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed is {seed} but must be at least 0"):
        TrainingConfig(seed=seed)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="loraplus_lr_ratio"):
        TrainingConfig(loraplus_lr_ratio=ratio)
