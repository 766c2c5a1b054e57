"""Resizing adapters on disk, against dense decompositions of their deltas."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_model, logits, randomise
from safetensors.torch import load_file
from tiny_adapters import learned
from torch import Tensor
from warm_cli import WarmCli

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, open_adapter, save_adapter
from twofold.adapter.updates import updates_of
from twofold.errors import ConfigError
from twofold.merging.resize import Size
from twofold.recipes.resize import resize

pytest_plugins = ("tiny_fixtures",)
NUMBERS = itertools.count()


def saved(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """A random adapter, whose directions fall off in size."""
    model = build_model(family)
    attach(model, LoraConfig(**{"r": 8, "lora_alpha": 4, **settings}))
    randomise(learned(model))
    for name, parameter in learned(model):
        if name.endswith(".A"):
            parameter.data *= 0.5 ** torch.arange(len(parameter))[:, None]
    return save_adapter(model, folder / f"adapter-{next(NUMBERS)}")


def dense(path: Path) -> dict[str, Tensor]:
    return {n: u.scale * u.B.double() @ u.A.double() for n, u in updates_of(open_adapter(path)).items()}


@pytest.mark.parametrize("r", [1, 3, 8, 20])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "target_modules": ["q_proj", "embed_tokens"]}, {"rank_pattern": {"q_proj": 2}}],
)
def test_a_rank_keeps_the_best_part(r: int, settings: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path, **settings)
    found = resize(path, tmp_path / "out", Size(r=r))
    small, whole = dense(tmp_path / "out"), dense(path)
    for module in found["modules"]:
        name = module["name"]
        values = torch.linalg.svdvals(whole[name])
        assert module["r"] == min(r, module["before"])
        missing = float((small[name] - whole[name]).norm())
        best = float(values[r:].norm()) if r < module["before"] else 0.0
        assert missing == pytest.approx(best, rel=1e-4, abs=1e-6 * float(values[0]))
        assert module["lost"] == pytest.approx(float(values[r:].square().sum() / values.square().sum()), abs=1e-9)
    lost = sum(float((small[n] - d).square().sum()) for n, d in whole.items())
    assert found["lost"] == pytest.approx(lost / sum(float(d.square().sum()) for d in whole.values()), abs=1e-8)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_gives_each_module_the_smallest_rank_that_keeps_it(energy: float, tmp_path: Path) -> None:
    path = saved(tmp_path)
    found = resize(path, tmp_path / "out", Size(energy=energy))
    for module in found["modules"]:
        values = torch.linalg.svdvals(dense(path)[module["name"]])[:8].square()
        kept = values.cumsum(0) / values.sum()
        assert module["r"] == int((kept < energy - 1e-12).sum()) + 1
        assert module["lost"] <= 1 - energy + 1e-9
    model = build_model("llama")
    load_adapter(model, tmp_path / "out")


def test_a_ratio_keeps_the_directions_that_are_not_so_much_smaller(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for module in resize(path, tmp_path / "out", Size(ratio=10))["modules"]:
        values = torch.linalg.svdvals(dense(path)[module["name"]])
        assert module["r"] == int((values >= values[0] / 10).sum())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj"]}),
        ("llama", {"lora_bias": True, "target_modules": ["q_proj"]}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"use_dora": True, "target_modules": ["q_proj"]}),
        ("gpt2", {}),
    ],
    ids=["bias", "lora_bias", "whole", "dora", "gpt2"],
)
def test_at_full_rank_nothing_is_lost_whatever_else_the_adapter_holds(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    path = saved(tmp_path, family, **settings)
    assert resize(path, tmp_path / "out", Size(energy=1.0))["lost"] < 1e-12
    before, after = build_model(family), build_model(family)
    load_adapter(before, path)
    load_adapter(after, tmp_path / "out")
    torch.testing.assert_close(logits(after), logits(before), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({}, "say one of --r, --energy and --ratio, not none"),
        ({"r": 2, "energy": 0.9}, "not r and energy"),
        ({"energy": 1.5}, "energy is 1.5, but must be above 0 and at most 1"),
        ({"ratio": 0.5}, "ratio is 0.5, but must be at least 1"),
        ({"ratio": float("nan")}, "ratio is nan, but must be at least 1"),
        ({"r": 0}, "the rank is 0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(size: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Size(**size)


def test_the_command(cli: WarmCli, tmp_path: Path) -> None:
    path = saved(tmp_path)
    found = cli("resize", path, "--r", 2, "-o", tmp_path / "out", "--json").json()
    assert (found["before"], found["r"]) == (8, 2)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {len(t) for k, t in tensors.items() if "lora_A" in k} == {2}
    assert "exists already" in cli("resize", path, "--r", 2, "-o", tmp_path / "out").refusal()
    assert "8 → 3" in cli("resize", path, "--r", 3, "-o", tmp_path / "other").stdout
