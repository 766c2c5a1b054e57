"""Adapters on the rows of one pass: losses and gradients are those that each has in a pass of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_base import llama

from twofold.adapter.attach import activate, adapters_of, attach, shares
from twofold.adapter.config import LoraConfig
from twofold.base.batch import Example, PackedBatch, pack
from twofold.base.blocks import Decoder, describe
from twofold.lowrank.joined import JoinedGroup
from twofold.lowrank.linear import Group, Projection
from twofold.training.joined import joined_losses
from twofold.training.objective import FastObjective

CONFIGS = {
    "small": LoraConfig(r=2, init_lora_weights=False),
    "large": LoraConfig(r=8, lora_alpha=8, use_rslora=True, init_lora_weights=False),
    "attention": LoraConfig(r=4, target_modules="attention", init_lora_weights=False),
    "down": LoraConfig(r=3, target_modules=["down_proj"], init_lora_weights="gaussian"),
}


def batch(seed: int, lengths: tuple[int, ...]) -> PackedBatch:
    """Examples that begin alike, so that prefixes are shared within a batch, and must not be between batches."""
    generator = torch.Generator().manual_seed(seed)
    begin = list(range(5, 20))
    bodies = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]
    return pack([Example(begin + body, [False] * (len(begin) + 1) + [True] * (len(body) - 1)) for body in bodies])


@pytest.fixture
def model() -> Any:
    found = llama(90).double()
    for name, config in CONFIGS.items():
        attach(found, config, name)
    for name in CONFIGS:
        for share in shares(found, name).values():
            for parameter in share.parameters():
                parameter.data = parameter.data.double()
    return found.eval()


BATCHES = {
    "small": batch(1, (5, 9, 4)),
    "large": batch(1, (5, 9, 4)),
    "attention": batch(2, (30,)),
    "down": batch(3, (3, 3, 3, 3, 40)),
}


def gradients(model: Any, name: str) -> list[torch.Tensor | None]:
    return [p.grad for share in shares(model, name).values() for p in share.parameters()]


@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_those_of_passes_of_their_own(model: Any, recompute: bool) -> None:
    alone = {}
    for name, own in BATCHES.items():
        activate(model, name)
        decoder = describe(model)
        assert isinstance(decoder, Decoder)
        found = FastObjective(decoder, recompute)(own)
        found.loss_sum.backward()
        alone[name] = (float(found.loss_sum.detach()), int(found.correct), gradients(model, name))
        model.zero_grad(set_to_none=True)
    activate(model, dict.fromkeys(CONFIGS, 1.0))
    decoder = describe(model)
    assert isinstance(decoder, Decoder)
    (adapters,) = adapters_of(model)
    together = joined_losses(decoder, adapters, BATCHES, recompute=recompute, share=True)
    torch.stack([t.loss_sum for t in together]).sum().backward()
    for (name, (loss, correct, expected)), found in zip(alone.items(), together, strict=True):
        assert float(found.loss_sum.detach()) == pytest.approx(loss, rel=1e-12)
        assert int(found.correct) == correct
        ours = gradients(model, name)
        assert any(g is not None and g.abs().max() > 0 for g in ours)
        for ours_one, theirs in zip(ours, expected, strict=True):
            assert (ours_one is None) == (theirs is None)
            assert ours_one is None or torch.allclose(ours_one, theirs, rtol=1e-9, atol=1e-12)


def test_one_adapter_alone_has_the_very_bits_of_its_own_pass(model: Any) -> None:
    activate(model, "large")
    decoder = describe(model)
    assert isinstance(decoder, Decoder)
    alone = FastObjective(decoder, False)(BATCHES["large"])
    (adapters,) = adapters_of(model)
    (joined,) = joined_losses(decoder, adapters, {"large": BATCHES["large"]}, recompute=False, share=True)
    assert torch.equal(alone.loss_sum, joined.loss_sum)


@pytest.mark.parametrize("order", [("small", "large"), ("large", "small")])
def test_an_adapter_that_broke_spoils_no_other(model: Any, order: tuple[str, str]) -> None:
    """Padding is read from rows that are nobody's, and 0 · NaN is NaN: so these must not depend on anybody's."""
    (adapters,) = adapters_of(model)
    activate(model, dict.fromkeys(CONFIGS, 1.0))
    decoder = describe(model)
    assert isinstance(decoder, Decoder)
    batches = {name: BATCHES[name] for name in order}
    sound = dict(zip(order, joined_losses(decoder, adapters, batches, recompute=False, share=True), strict=True))
    for share in shares(model, "large").values():
        for parameter in share.parameters():
            parameter.data.fill_(float("nan"))
    found = dict(zip(order, joined_losses(decoder, adapters, batches, recompute=False, share=True), strict=True))
    torch.stack([one.loss_sum for one in found.values()]).sum().backward()
    assert found["large"].loss_sum.isnan()
    assert torch.equal(found["small"].loss_sum, sound["small"].loss_sum)
    assert all(bool(g.isfinite().all()) for g in gradients(model, "small") if g is not None)


def test_groups_that_drop_inputs_are_refused() -> None:
    group = Group.of([Projection(torch.zeros(2, 2), None, None)], torch.float32)
    JoinedGroup.join([group], [slice(0, 1)], [slice(0, 1)])
    with pytest.raises(ValueError, match="dropout"):
        JoinedGroup.join([Group(group.members, torch.zeros(1, 2), 0.1)], [slice(0, 1)], [slice(0, 1)])
