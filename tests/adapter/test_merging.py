"""Merging on live models of every family: the same outputs, and the base's own bits afterwards."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build_model, logits, randomise
from tiny_adapters import adapted, everything, learned

from twofold.adapter.attach import (
    activate,
    adapter_layers,
    attach,
    attached,
    detach,
    disabled,
    is_merged,
    merge,
    unmerge,
)
from twofold.adapter.config import LoraConfig
from twofold.errors import ConfigError
from twofold.layers.linear import LoraLinear


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged_and_unmerging_restores_the_bits(family: str) -> None:
    model = adapted(family, everything(family))
    with disabled(model):
        bare = logits(model)
    before = logits(model)
    merge(model)
    assert is_merged(model)
    merged = logits(model)
    torch.testing.assert_close(merged, before, rtol=1e-5, atol=1e-5)
    with disabled(model):
        assert torch.equal(logits(model), bare)
    merge(model)
    assert torch.equal(logits(model), merged), "merging again changes nothing"
    unmerge(model)
    assert not is_merged(model)
    assert torch.equal(logits(model), before)


def test_a_merged_weight_is_the_base_plus_the_delta_rounded_once() -> None:
    model = adapted("llama").to(torch.bfloat16)
    merge(model)
    for _, layer in adapter_layers(model):
        assert isinstance(layer, LoraLinear)
        exact = layer.weight.double() + layer.delta().double()
        assert layer.merged is not None
        assert layer.merged.dtype is torch.bfloat16
        gap = (layer.merged.double() - exact).abs()
        assert bool((gap <= exact.abs() * 2**-8).all())


def test_what_is_merged_must_be_unmerged_before_choosing_others() -> None:
    model = adapted("llama")
    before = logits(model)
    merge(model)
    merged = logits(model)
    for change in (
        lambda: activate(model, None),
        lambda: activate(model, "default"),
        lambda: attach(model, LoraConfig(r=2), "other"),
    ):
        with pytest.raises(ConfigError, match="unmerge"):
            change()
    assert attached(model) == ["default"]
    assert torch.equal(logits(model), merged)
    unmerge(model)
    assert torch.equal(logits(model), before)


def test_detaching_one_of_two_merged_adapters_leaves_no_trace_of_it() -> None:
    model = adapted("llama")
    alone = logits(model)
    attach(model, LoraConfig(r=2), "second")
    randomise([(n, p) for n, p in learned(model) if ".second." in n], seed=5)
    activate(model, {"default": 1.0, "second": 1.0})
    merge(model)
    with pytest.raises(ConfigError, match="unmerge"):
        detach(model, "second")
    unmerge(model)
    detach(model, "second")
    assert torch.equal(logits(model), alone)


def test_all_adapters_can_be_detached_while_merged() -> None:
    model = build_model("llama").requires_grad_(False)
    bare = logits(model)
    attach(model, LoraConfig())
    randomise(learned(model))
    merge(model)
    detach(model)
    assert torch.equal(logits(model), bare)


def test_a_tied_head_keeps_its_weight_when_the_embedding_is_merged() -> None:
    model = build_model("llama-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    attach(model, LoraConfig(r=4, target_modules=("embed_tokens",)))
    randomise(learned(model))
    before = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
