"""Adapted convolutions of every geometry: against the dense kernel in float64, against PEFT where PEFT is right, and merged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twofold.adapter.attach import activate, adapter_layers, attach, detach, disabled, folding, merge, shares, unmerge
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, save_adapter
from twofold.adapter.shapes import module_shapes
from twofold.adapter.target import find_targets
from twofold.errors import ConfigError, TargetError
from twofold.layers.conv import LoraConv
from twofold.planning.parameters import plan_parameters

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "same": {"padding": "same", "dilation": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflected": {"padding": 1, "padding_mode": "reflect", "stride": 2},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "dilation": 2, "bias": False},
    "pointwise": {"kernel_size": 1},
}
CASES = pytest.mark.parametrize(("dimensions", "geometry"), [(d, g) for d in CLASSES for g in GEOMETRIES])
KNOWN_TO_PEFT = [g for g in GEOMETRIES if g in ("plain", "strided", "grouped", "pointwise")]


def net(dimensions: int, geometry: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    settings = {"kernel_size": 3, **GEOMETRIES[geometry]}
    return nn.Sequential(CLASSES[dimensions](4, 8, **settings), nn.GELU()).to(dtype).eval()


def image(dimensions: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(4)
    return torch.randn(2, 4, *(7,) * dimensions, dtype=dtype)


CONFIG = LoraConfig(r=8, lora_alpha=4, target_modules=("0",))


def adapted(model: nn.Module, name: str = "default", seed: int = 0, **settings: Any) -> Any:
    attach(model, LoraConfig(**{"r": 8, "lora_alpha": 4, "target_modules": ("0",), **settings}), name)
    torch.manual_seed(seed)
    for parameter in shares(model, name)["0"].parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def dense(model: Any) -> Tensor:
    """What the adapted convolution must give: one without groups whose kernel is the base's and B·A, written out by hand."""
    layer = model[0]
    base, groups = layer.base, layer.base.groups
    kernel = base.weight.new_zeros(8, 4, *base.kernel_size)
    for o in range(8):
        first = (o * groups // 8) * (4 // groups)
        kernel[o, first : first + 4 // groups] = base.weight[o]
        for share in layer.shares.values():
            part = share.A.shape[0] // groups
            for j in range(part):
                inside = share.A[(o * groups // 8) * part + j]
                kernel[o] += share.weight_when_active * share.scale * share.B[o, j].flatten() * inside
    whole: Any = CLASSES[kernel.dim() - 2](4, 8, **{"kernel_size": 3} | geometry_of(base)).to(kernel.dtype)
    return F.gelu(torch.func.functional_call(whole, _named(kernel, base), (image(kernel.dim() - 2),)))


def geometry_of(base: Any) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {n: getattr(base, n) for n in names} | {"bias": base.bias is not None}


def _named(kernel: Tensor, base: Any) -> dict[str, Tensor]:
    return {"weight": kernel} | ({} if base.bias is None else {"bias": base.bias})


@CASES
def test_forward_gradient_and_merging_are_those_of_the_dense_kernel(dimensions: int, geometry: str) -> None:
    model, x = adapted(net(dimensions, geometry)), image(dimensions)
    found, expected = model(x), dense(model)
    torch.testing.assert_close(found, expected)
    learned = list(shares(model, "default")["0"].parameters())
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), learned) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    with folding(model):
        torch.testing.assert_close(model(x), expected)
    merge(model)
    torch.testing.assert_close(model(x), expected)
    unmerge(model)
    assert torch.equal(model(x), found)


@CASES
def test_at_the_start_and_switched_off_it_is_the_base_bit_for_bit(dimensions: int, geometry: str) -> None:
    model, x = net(dimensions, geometry).requires_grad_(False), image(dimensions)
    before, bits = model(x), model[0].weight.clone()
    attach(model, CONFIG)
    assert torch.equal(model(x), before)
    nn.init.normal_(model[0].shares["default"].B)
    assert not torch.equal(model(x), before)
    with disabled(model):
        assert torch.equal(model(x), before)
    detach(model)
    assert isinstance(model[0], CLASSES[dimensions])
    assert torch.equal(model[0].weight, bits)
    assert torch.equal(model(x), before)


def test_several_adapters_add_up_by_their_weights() -> None:
    model = adapted(adapted(net(2, "grouped")), "second", seed=1, r=4)
    activate(model, {"default": 0.5, "second": -2.0})
    torch.testing.assert_close(model(image(2)), dense(model))
    merge(model)
    torch.testing.assert_close(model(image(2)), dense(model))


def in_peft(dimensions: int, geometry: str, **settings: Any) -> Any:
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 4, "target_modules": ["0"], **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net(dimensions, geometry, torch.float32), config).eval()
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("dimensions", list(CLASSES))
@pytest.mark.parametrize("geometry", KNOWN_TO_PEFT)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "bias": "lora_only"}], ids=["plain", "rslora and bias"])
def test_files_of_peft_and_ours_are_the_same_adapter(
    dimensions: int, geometry: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs, x = in_peft(dimensions, geometry, **settings), image(dimensions, torch.float32)
    if "bias" in settings:
        with torch.no_grad():
            theirs.base_model.model[0].base_layer.bias.add_(0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = net(dimensions, geometry, torch.float32)
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(dimensions, geometry, torch.float32), tmp_path / "ours").eval()
    torch.testing.assert_close(back(x), ours(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("geometry", ["circular", "reflected"])
def test_other_padding_is_what_peft_merges_though_not_what_it_runs(geometry: str, tmp_path: Path) -> None:
    """PEFT's A pads with zeros whatever the base does; its merged kernel is right, and is the oracle here."""
    theirs, x = in_peft(2, geometry), image(2, torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    running, merged = theirs(x), theirs.merge_and_unload()(x)
    assert not torch.allclose(running, merged, atol=1e-2)
    ours = net(2, geometry, torch.float32)
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x), merged, rtol=1e-5, atol=1e-5)


def test_dropout_falls_on_the_input_of_a_in_training_alone() -> None:
    model, x = adapted(net(2, "plain"), lora_dropout=0.5), image(2)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    nn.init.zeros_(model[0].shares["default"].B)
    assert torch.equal(model(x), F.gelu(model[0].base(x)))


def test_bfloat16_base_keeps_float32_factors_and_its_own_type() -> None:
    model = adapted(net(2, "strided", torch.bfloat16))
    y = model(image(2, torch.bfloat16))
    assert y.dtype is torch.bfloat16
    assert {p.dtype for p in shares(model, "default")["0"].parameters()} == {torch.float32}
    y.sum().backward()
    merge(model)
    torch.testing.assert_close(model(image(2, torch.bfloat16)), y, rtol=0.05, atol=0.05)


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'0' is a convolution with 4 groups, of which r = 6 is no multiple"):
        attach(model := net(2, "depthwise"), LoraConfig(r=6, target_modules=("0",)))
    assert not list(adapter_layers(model))
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(TargetError, match="'0' matches target_modules but is a ConvTranspose2d"):
        attach(nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), CONFIG)
    with pytest.raises(TargetError, match="leaves nothing to adapt"):
        attach(net(2, "plain"), LoraConfig(target_modules="all-linear"))
    grouped = adapted(net(2, "grouped"))
    with pytest.raises(ConfigError, match="2 groups reaches across its groups"):
        grouped[0].folded()


def test_a_folded_kernel_is_the_state_of_the_bare_convolution() -> None:
    model = adapted(net(3, "strided"), bias="lora_only")
    bare = net(3, "strided")
    bare[0].load_state_dict(model[0].folded())
    torch.testing.assert_close(bare(image(3)), model(image(3)))


@CASES
def test_counted_before_as_attached_after(dimensions: int, geometry: str) -> None:
    model = net(dimensions, geometry)
    planned = plan_parameters(CONFIG, module_shapes(model), 1).trainable
    assert attach(model, CONFIG).trainable == planned
    assert isinstance(model[0], LoraConv)
    assert find_targets(CONFIG, module_shapes(model)).adapted.keys() == {"0"}, "adapted ones look as before"
