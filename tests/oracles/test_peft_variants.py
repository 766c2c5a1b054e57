"""PEFT as oracle for the variants: the same logits and gradients, and files that each reads from the other."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build_model, logits, randomise
from peft.optimizers import create_loraplus_optimizer
from safetensors import safe_open
from torch import Tensor, nn

from twofold.adapter.attach import attach, shares
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, open_adapter, save_adapter
from twofold.errors import AdapterFileError
from twofold.layers.linear import LinearShare
from twofold.training.optim import TrainingConfig, optimiser

VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora and patterns": {"use_dora": True, "rank_pattern": {r"0\..*": 2}, "alpha_pattern": {r"1\..*": 3}},
    "dora and bias": {"use_dora": True, "bias": "all"},
    "lora_bias": {"lora_bias": True},
    "false": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa and rslora": {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {r"0\..*": 2}},
    "olora": {"init_lora_weights": "olora"},
}
GRID = pytest.mark.parametrize(
    ("family", "name"),
    [(f, n) for f in ("llama-tied", "gpt2", "phi3") for n in VARIANTS if (f, n) != ("gpt2", "olora")],
)
"""PEFT's OLoRA takes Conv1D's weight as it lies, transposed, and so has factors of the wrong shapes."""


def settings(name: str) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **VARIANTS[name]}


def in_peft(family: str, name: str) -> Any:
    """A PEFT model of which everything that learns has moved from its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        model = peft.get_peft_model(build_model(family), peft.LoraConfig(**settings(name))).eval()
    move(model)
    return model


@torch.no_grad()
def move(model: nn.Module) -> None:
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.clone() for n, p in learned.items()}
    randomise(list(learned.items()), scale=0.1)
    for n, p in learned.items():
        p.add_(before[n])


def saved(model: Any, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


def opened(family: str, path: Path) -> Any:
    """The folder opened by PEFT, which must not find anything missing or left over."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(build_model(family), path, is_trainable=True).eval()
    assert not [str(w.message) for w in said if "key" in str(w.message)]
    return model


@GRID
def test_the_adapter_of_peft_gives_the_same_logits_here(family: str, name: str, tmp_path: Path) -> None:
    """PiSSA's and OLoRA's too, whose base PEFT has changed: here it is as it was."""
    theirs, ours = in_peft(family, name), build_model(family)
    load_adapter(ours, saved(theirs, tmp_path / "a"))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=2e-5)


@GRID
def test_our_adapter_gives_the_same_logits_in_peft(family: str, name: str, tmp_path: Path) -> None:
    ours = build_model(family)
    attach(ours, LoraConfig(**settings(name)))
    move(ours)
    save_adapter(ours, tmp_path / "a")
    torch.testing.assert_close(logits(opened(family, tmp_path / "a")), logits(ours), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["dora", "lora_bias"])
def test_our_file_has_exactly_the_tensors_of_peft(name: str, tmp_path: Path) -> None:
    theirs = saved(in_peft("gpt2", name), tmp_path / "theirs")
    ours = build_model("gpt2")
    attach(ours, LoraConfig(**settings(name)))
    assert shapes_in(save_adapter(ours, tmp_path / "ours")) == shapes_in(theirs)


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


@GRID
def test_gradients_of_a_step_are_those_of_peft(family: str, name: str, tmp_path: Path) -> None:
    path = saved(in_peft(family, name), tmp_path / "a")
    theirs, ours = opened(family, path).double(), build_model(family)
    load_adapter(ours, path)
    for model in (theirs, ours.double()):
        found: Tensor = logits(model)
        (torch.log_softmax(found, -1) * torch.linspace(-1, 1, found.numel()).view(found.shape)).sum().backward()
    expected = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.grad is not None
    }
    largest = max(float(g.norm()) for g in expected.values())
    checked = 0
    for module, share in shares(ours, "default").items():
        if not isinstance(share, LinearShare):
            continue
        pairs = {"lora_A.weight": share.A, "lora_B.weight": share.B, "lora_B.bias": share.b_bias}
        pairs |= {"lora_magnitude_vector.weight": share.magnitude}
        for suffix, parameter in pairs.items():
            if parameter is not None:
                assert parameter.grad is not None
                right = expected[f"{module}.{suffix}"]
                assert (parameter.grad - right).norm() <= 1e-5 * right.norm() + 1e-6 * largest, f"{module}.{suffix}"
                checked += 1
    assert checked >= 2 * len(shares(ours, "default")) - 2


@pytest.mark.parametrize("name", ["pissa", "olora", "dora", "lora_bias"])
def test_starts_are_those_of_peft(name: str) -> None:
    """Up to the signs that a decomposition leaves open: the products, the magnitudes and what is zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build_model("llama"), peft.LoraConfig(**settings(name)))
    ours = build_model("llama")
    summary = attach(ours, LoraConfig(**settings(name)))
    assert summary.trainable == theirs.get_nb_trainable_parameters()[0]
    for module, share in shares(ours, "default").items():
        layer = theirs.base_model.model.get_submodule(module)
        assert isinstance(share, LinearShare)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(share.B @ share.A, product, rtol=1e-4, atol=1e-6)
        if share.magnitude is not None:
            torch.testing.assert_close(share.magnitude, layer.lora_magnitude_vector["default"].weight)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_raw_factors_are_not_opened_without_their_base(start: str, tmp_path: Path) -> None:
    path = saved(in_peft("llama", start), tmp_path / "raw")
    with pytest.raises(AdapterFileError, match="fit a base that PEFT changed"):
        open_adapter(path)
    model = build_model("llama")
    load_adapter(model, path)
    open_adapter(save_adapter(model, tmp_path / "plain"))


def test_a_start_that_cannot_be_computed_again_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_4")
        path = saved(peft.get_peft_model(build_model("llama"), config), tmp_path / "a")
    with pytest.raises(AdapterFileError, match="changed the base when training began"):
        load_adapter(build_model("llama"), path)


def test_a_step_of_lora_plus_is_that_of_peft(tmp_path: Path) -> None:
    path = saved(in_peft("llama", "lora_bias"), tmp_path / "a")
    theirs, ours = opened("llama", path), build_model("llama")
    load_adapter(ours, path)
    config = TrainingConfig(learning_rate=1e-2, loraplus_lr_ratio=8.0)
    steppers = [
        create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0),
        optimiser(ours, config),
    ]
    for model, stepper in zip((theirs, ours), steppers, strict=True):
        for _ in range(3):
            torch.log_softmax(logits(model), -1)[..., 3].sum().backward()
            stepper.step()
            stepper.zero_grad()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
