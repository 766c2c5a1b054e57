"""Several adapters on one model: they add up, and each leaves the others alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build_model, logits, randomise
from tiny_adapters import adapted, everything, learned
from torch import Tensor, nn

from twofold.adapter.attach import (
    activate,
    active,
    adapter_layers,
    attach,
    attached,
    detach,
    merge,
    trainable_summary,
)
from twofold.adapter.config import LoraConfig
from twofold.errors import ClashError
from twofold.layers.embedding import LoraEmbedding
from twofold.layers.linear import LoraLinear


def deltas_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: layer.delta() for n, layer in adapter_layers(model) if isinstance(layer, LoraLinear | LoraEmbedding)}


@pytest.mark.parametrize("family", FAMILIES)
def test_several_active_adapters_add_up_by_their_weights(family: str) -> None:
    model = adapted(family, everything(family))
    second = LoraConfig(**{**vars(everything(family)), "r": 2, "use_rslora": True, "bias": "none"})
    attach(model, second, "b")
    randomise([(n, p) for n, p in learned(model) if ".b." in n], seed=23, scale=0.1)
    deltas: dict[str, dict[str, Tensor]] = {}
    for name in ("default", "b"):
        activate(model, name)
        deltas[name] = deltas_of(model)
    activate(model, weights := {"default": 0.3, "b": -1.5})
    assert active(model) == weights
    found = deltas_of(model)
    for name, delta in found.items():
        expected = sum(w * deltas[a][name] for a, w in weights.items())
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)
    together = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), together, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        ({"modules_to_save": ("lm_head",)}, {"target_modules": ("lm_head",)}, "'lm_head'"),
        ({}, {"modules_to_save": ("up_proj",), "target_modules": ("q_proj",)}, "'model.layers.0.mlp.up_proj'"),
        ({}, {"target_modules": ("o_proj",), "bias": "all"}, "'model.layers.0.self_attn.q_proj'"),
    ],
)
def test_adapters_that_change_a_module_in_different_ways_are_refused(first: Any, second: Any, clash: str) -> None:
    model = build_model("qwen2")
    attach(model, LoraConfig(**first))
    before, structure = logits(model), repr(model)
    with pytest.raises(ClashError, match=f"another adapter changes .*{clash}"):
        attach(model, LoraConfig(**second), "b")
    assert repr(model) == structure
    assert torch.equal(logits(model), before)
    assert active(model) == {"default": 1.0}


def test_only_active_adapters_learn_and_count() -> None:
    model = adapted("llama")
    first = trainable_summary(model).trainable
    second = attach(model, LoraConfig(r=2, target_modules=("q_proj",)), "b")
    assert active(model) == {"b": 1.0}
    assert second.trainable < first
    assert {n.split(".shares.")[1].split(".")[0] for n, _ in learned(model)} == {"b"}
    activate(model, None)
    assert trainable_summary(model).trainable == 0
    activate(model, {"default": 1.0, "b": 0.5})
    assert trainable_summary(model).trainable == first + second.trainable


def test_detaching_one_adapter_leaves_the_other_as_it_was() -> None:
    model = adapted("llama")
    alone = logits(model)
    attach(model, LoraConfig(r=2, target_modules=("q_proj", "lm_head")), "b")
    detach(model, "b")
    assert attached(model) == ["default"]
    assert not isinstance(model.lm_head, LoraLinear)
    activate(model, "default")
    assert torch.equal(logits(model), alone)
