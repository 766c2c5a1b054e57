"""PEFT as oracle for DoRA over convolutions and embeddings: start, outputs, gradients, files both ways; merging in float64."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from twofold.adapter.attach import activate, attach, merge, shares, unmerge
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, save_adapter
from twofold.errors import ConfigError
from twofold.lowrank.factors import LowRank

CLASSES = {"conv1": nn.Conv1d, "conv2": nn.Conv2d, "conv3": nn.Conv3d}
KINDS = pytest.mark.parametrize("kind", [*CLASSES, "embedding"])
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "use_dora": True}


def net(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "embedding":
        return nn.Sequential(nn.Embedding(11, 8)).double().eval()
    return nn.Sequential(CLASSES[kind](4, 8, 3, stride=2, padding=1)).double().eval()


def inputs(kind: str) -> Tensor:
    torch.manual_seed(4)
    if kind == "embedding":
        return torch.randint(11, (3, 5))
    return torch.randn(2, 4, *(7,) * int(kind[-1])).double()


@torch.no_grad()
def move(model: nn.Module) -> None:
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def in_peft(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(net(kind), peft.LoraConfig(**SETTINGS)).double().eval()


def learned(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@KINDS
def test_the_start_is_the_base_and_its_lengths_are_those_of_peft(kind: str) -> None:
    model, x = net(kind), inputs(kind)
    bare = model(x)
    attach(model, LoraConfig(**SETTINGS))
    torch.testing.assert_close(model(x), bare, rtol=1e-12, atol=1e-12)
    theirs = in_peft(kind).base_model.model[0].lora_magnitude_vector["default"].weight
    magnitude = shares(model, "default")["0"].magnitude
    assert isinstance(magnitude, Tensor)
    torch.testing.assert_close(magnitude, theirs)


@KINDS
def test_outputs_gradients_and_files_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    theirs, ours, x = in_peft(kind), net(kind), inputs(kind)
    move(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(m(x).square().sum(), learned(m)) for m in (ours, theirs)]
    shapes = [sorted((tuple(g.shape), float(g.norm())) for g in found) for found in gradients]
    assert [s for s, _ in shapes[0]] == [s for s, _ in shapes[1]]
    assert [n for _, n in shapes[0]] == pytest.approx([n for _, n in shapes[1]], rel=1e-5)
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        back = peft.PeftModel.from_pretrained(net(kind), tmp_path / "ours").double().eval()
    assert not [str(w.message) for w in said if "key" in str(w.message)]
    torch.testing.assert_close(back(x), ours(x), rtol=1e-6, atol=1e-6)


@KINDS
def test_merged_it_is_the_formula_and_unmerging_gives_back_the_bits(kind: str) -> None:
    """m / ||W + sBA|| ⊙ (W + sBA), written out in float64; and as a plain layer's weight."""
    model, x = net(kind), inputs(kind)
    attach(model, LoraConfig(**SETTINGS))
    move(model)
    layer, share, before = model[0], shares(model, "default")["0"], model(x)
    update = share.low_rank()
    assert isinstance(update, LowRank)
    base = layer.base.weight.detach()
    whole = (base.T if kind == "embedding" else base.flatten(1)) + update.scale * update.B @ update.A
    expected = share.magnitude.flatten()[:, None] * whole / whole.norm(dim=1, keepdim=True)
    expected = (expected.T if kind == "embedding" else expected.view_as(base)).detach()
    torch.testing.assert_close(layer.fold(), expected)
    torch.testing.assert_close(layer.delta(), expected - base)
    bare = net(kind)
    bare[0].load_state_dict(layer.folded() | ({} if kind == "embedding" else {"bias": layer.base.bias}))
    torch.testing.assert_close(bare(x), before)
    merge(model)
    torch.testing.assert_close(model(x), before)
    unmerge(model)
    assert torch.equal(model(x), before)


def test_groups_and_sums_are_refused() -> None:
    with pytest.raises(ConfigError, match="convolutions without groups, but the targets include '0'"):
        attach(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), LoraConfig(**SETTINGS))
    model = net("embedding")
    attach(model, LoraConfig(**SETTINGS), "a")
    attach(model, LoraConfig(r=2, target_modules=["0"]), "b")
    with pytest.raises(ConfigError, match="'a' is DoRA"):
        activate(model, {"a": 1.0, "b": 1.0})
