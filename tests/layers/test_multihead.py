"""Adapted `nn.MultiheadAttention`: torch's own module on hand-merged weights is the oracle, in every way of calling it."""

from __future__ import annotations

import warnings
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
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
from twofold.adapter.files import load_adapter, save_adapter
from twofold.adapter.shapes import module_shapes
from twofold.errors import TargetError
from twofold.layers.attention import LoraAttention
from twofold.planning.parameters import plan_parameters

D, HEADS, BATCH, TARGETS, SOURCES = 8, 2, 3, 5, 6


class Net(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(D, HEADS, **settings)

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.mha(*args, **named)


def net(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = Net(**settings).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.requires_grad_(False)


def adapted(model: Any, name: str = "default", seed: int = 2, **settings: Any) -> Any:
    attach(model, LoraConfig(**{"r": 3, "lora_alpha": 4, "target_modules": ("mha",), **settings}), name)
    torch.manual_seed(seed)
    for parameter in shares(model, name)["mha"].parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def merged_by_hand(model: Any, **settings: Any) -> Any:
    """A bare module with the formula's weights in it, in the same mode."""
    bare = net(**settings).train(model.training)
    state = dict(model.mha.base.state_dict())
    for share in model.mha.shares.values():
        factor = share.weight_when_active * 4 / 3
        state["in_proj_weight"] = state["in_proj_weight"] + factor * share.into.B @ share.into.A
        state["out_proj.weight"] = state["out_proj.weight"] + factor * share.out.B @ share.out.A
    return lambda *args, **named: torch.func.functional_call(
        bare, {f"mha.{k}": v for k, v in state.items()}, args, named
    )


def inputs(form: str, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    sources = TARGETS if form == "self" else SOURCES
    q, k, v = (torch.randn(BATCH, n, D, dtype=torch.float64) for n in (TARGETS, sources, sources))
    k, v = {"self": (q, q), "cross": (k, k), "three": (k, v)}[form]
    laid = {id(x): x if batch_first else x.transpose(0, 1) for x in (q, k, v)}
    return laid[id(q)], laid[id(k)], laid[id(v)]


def masks(kind: str, sources: int) -> dict[str, Any]:
    hidden = torch.rand(TARGETS, sources, generator=torch.Generator().manual_seed(4)) > 0.6
    hidden[:, 0] = False
    padding = torch.zeros(BATCH, sources, dtype=torch.bool)
    padding[1, 3:] = True
    causal = torch.triu(torch.ones(TARGETS, sources, dtype=torch.bool), 1)
    by_head = torch.randn(BATCH * HEADS, TARGETS, sources, dtype=torch.float64)
    return {
        "none": {},
        "truth": {"attn_mask": hidden},
        "added, by head": {"attn_mask": by_head},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": by_head, "key_padding_mask": padding.double().masked_fill(padding, float("-inf"))},
        "causal": {"attn_mask": causal, "is_causal": True},
    }[kind]


MASKS = ("none", "truth", "added, by head", "padding", "both", "causal")
SETTINGS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
]


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("form", ["self", "cross", "three"])
def test_every_way_of_calling_it_is_torchs_on_merged_weights(form: str, settings: dict[str, Any]) -> None:
    model = adapted(net(**settings))
    expected = merged_by_hand(model, **settings)
    q, k, v = inputs(form, settings.get("batch_first", False))
    asked = ({"need_weights": False}, {"need_weights": True}, {"average_attn_weights": False})
    for kind, named in product(MASKS, asked):
        call = masks(kind, TARGETS if form == "self" else SOURCES) | named
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch: masks of two types
            same(model(q, k, v, **call), expected(q, k, v, **call))


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_single_sequence_needs_no_batch(need_weights: bool) -> None:
    model = adapted(net(batch_first=True))
    x = torch.randn(TARGETS, D, dtype=torch.float64)
    padding = torch.tensor([False, False, True, False, True])
    call = {"need_weights": need_weights, "key_padding_mask": padding}
    same(model(x, x, x, **call), merged_by_hand(model, batch_first=True)(x, x, x, **call))


@pytest.mark.parametrize("form", ["self", "cross", "three"])
def test_gradients_are_those_of_the_formula(form: str) -> None:
    model = adapted(net())
    q, k, v = (x.clone().requires_grad_() for x in inputs(form, False)) if form == "three" else inputs(form, False)
    learned = [p for p in model.parameters() if p.requires_grad] + [x for x in (q, k, v) if x.requires_grad]
    ours, theirs = (
        torch.autograd.grad(run(q, k, v)[0].square().sum(), learned) for run in (model, merged_by_hand(model))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_start_off_merged_and_detached() -> None:
    model, x = net(batch_first=True).train(), inputs("self", True)[0]
    bare, bits = model(x, x, x), model.mha.in_proj_weight.clone()
    planned = plan_parameters(LoraConfig(r=3, target_modules=("mha",)), module_shapes(model), 1).trainable
    attach(model, LoraConfig(r=3, target_modules=("mha",)))
    assert trainable_summary(model).trainable == planned
    torch.testing.assert_close(model(x, x, x)[0], bare[0], rtol=0, atol=1e-14)
    detach(model)
    model = adapted(model)
    found = model(x, x, x)
    assert not torch.allclose(found[0], bare[0])
    with disabled(model):
        assert torch.equal(model(x, x, x)[0], bare[0])
    with folding(model):
        same(model(x, x, x), found)
    merge(model)
    same(model(x, x, x), found)
    assert model.float().mha.merged["in_proj_weight"].dtype is torch.float32
    model.double()
    unmerge(model)
    detach(model)
    assert type(model.mha) is nn.MultiheadAttention
    assert torch.equal(model.mha.in_proj_weight, bits.float().double())


def test_several_adapters_add_up_by_their_weights() -> None:
    model = adapted(adapted(net()), "second", seed=5)
    activate(model, {"default": 0.5, "second": -2.0})
    q, k, v = inputs("cross", False)
    same(model(q, k, v), merged_by_hand(model)(q, k, v))
    merge(model)
    same(model(q, k, v), merged_by_hand(model)(q, k, v))


@pytest.mark.parametrize("training", [False, True])
def test_torchs_encoder_layer_runs_the_adapter_even_where_it_has_a_kernel_of_its_own(training: bool) -> None:
    """In evaluation the layer would run its weights in one kernel, past any module inside of it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, HEADS, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(training).requires_grad_(False)
    x = torch.randn(BATCH, TARGETS, D)
    with torch.no_grad():
        bare = model(x)
        attach(model, LoraConfig(r=2, target_modules=("self_attn", "linear1")))
        torch.testing.assert_close(model(x), bare)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        found = model(x)
        assert not torch.allclose(found, bare, atol=1e-2)
        merge(model)
        torch.testing.assert_close(model(x), found, rtol=1e-4, atol=1e-4)
        with disabled(model):
            torch.testing.assert_close(model(x), bare)


def double_out(model: Any) -> Any:
    """PEFT adds the update of the output projection twice, ours once: a doubled B stands for it."""
    shares(model, "default")["mha"].out.B.data.mul_(2)
    return model


def test_files_of_peft_and_ours_are_the_same_but_for_what_peft_adds_twice(tmp_path: Path) -> None:
    def make() -> Any:
        return net(torch.float32, batch_first=True).eval()

    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=3, lora_alpha=4, target_modules=["mha"])).eval()
    torch.manual_seed(6)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.4)
    x = inputs("self", True)[0].float()
    expected = theirs(x, x, x)[0]
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make()
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(double_out(ours)(x, x, x)[0], expected, rtol=1e-4, atol=1e-4)
    files = [load_file(tmp_path / w / "adapter_model.safetensors") for w in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(x, x, x)[0], expected, rtol=1e-4, atol=1e-4)


def test_dropout_and_bfloat16() -> None:
    model = adapted(net(torch.bfloat16), lora_dropout=0.5)
    x = inputs("self", False)[0].bfloat16()
    assert not torch.equal(model(x, x, x)[0], model(x, x, x)[0])
    model.eval()
    found = model(x, x, x)[0]
    assert torch.equal(model(x, x, x)[0], found)
    assert found.dtype is torch.bfloat16
    assert {p.dtype for p in shares(model, "default")["mha"].parameters()} == {torch.float32}
    assert isinstance(model.mha, LoraAttention)


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(TargetError, match="MultiheadAttention with kdim or vdim"):
        attach(net(kdim=4, vdim=6), LoraConfig(target_modules=("mha",)))
    with pytest.raises(TargetError, match=r"'mha\.out_proj' matches target_modules but is a NonDynamically"):
        attach(net(), LoraConfig(target_modules=("out_proj",)))
    with pytest.raises(TargetError, match="bias='all' does not reach"):
        attach(net(), LoraConfig(target_modules=("mha",), bias="all"))
