"""Comparing adapters, against numpy on the whole deltas."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from warm_cli import WarmCli

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.base.load import load_base
from twofold.errors import ConfigError
from twofold.recipes.inspect import compare

pytest_plugins = ("tiny_fixtures",)


def adapter(base: Path, output: Path, seed: int, **settings: Any) -> Path:
    model = load_base(str(base), "float32", "cpu").model
    attach(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return save_adapter(model, output)


def deltas(folder: Path, scale: float) -> dict[str, np.ndarray[Any, Any]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    return {
        n.removeprefix("base_model.model."): scale
        * (tensors[f"{n}.lora_B.weight"].double() @ tensors[f"{n}.lora_A.weight"].double()).numpy()
        for n in names
    }


def test_cosines_and_spaces_are_those_of_the_whole_deltas(llama_base: Path, tmp_path: Path) -> None:
    first = adapter(llama_base, tmp_path / "a", 1)
    second = adapter(llama_base, tmp_path / "b", 2, r=2, target_modules="attention")
    found = compare(first, second)
    a, b = deltas(first, 2.0), deltas(second, 4.0)
    assert [m.name for m in found.modules] == [n for n in a if n in b] != []
    assert set(found.only_first) == set(a) - set(b)
    assert found.only_second == []
    assert found.config["r"] == (4, 2)
    for m in found.modules:
        x, y = a[m.name], b[m.name]
        assert m.cosine == pytest.approx(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))
        assert m.norms == pytest.approx((np.linalg.norm(x), np.linalg.norm(y)))
        (ux, _, vx), (uy, _, vy) = np.linalg.svd(x), np.linalg.svd(y)
        for i in range(4):
            for j in range(2):
                smaller = min(i, j) + 1
                left = np.sum((ux[:, : i + 1].T @ uy[:, : j + 1]) ** 2) / smaller
                right = np.sum((vx[: i + 1] @ vy[: j + 1].T) ** 2) / smaller
                assert m.output_similarity[i][j] == pytest.approx(left)
                assert m.input_similarity[i][j] == pytest.approx(right)
        assert m.output_baseline == 4 / x.shape[0]
    whole = sum(np.sum(a[n] * b[n]) for n in b)
    sizes = [np.sqrt(sum(np.sum(d**2) for d in found.values())) for found in (a, b)]
    assert found.cosine == pytest.approx(whole / sizes[0] / sizes[1])


def test_the_baseline_is_what_random_spaces_give(llama_base: Path, tmp_path: Path) -> None:
    pairs = [
        (adapter(llama_base, tmp_path / f"{i}", i), adapter(llama_base, tmp_path / f"{i}b", 50 + i)) for i in range(4)
    ]
    found = [m for a, b in pairs for m in compare(a, b).modules]
    mean = np.mean([m.output_similarity[-1][-1] / m.output_baseline for m in found])
    assert mean == pytest.approx(1.0, abs=0.15)


def test_an_adapter_is_like_itself_and_unlike_one_of_other_modules(llama_base: Path, tmp_path: Path) -> None:
    first = adapter(llama_base, tmp_path / "a", 1, target_modules=["q_proj"])
    same = compare(first, first)
    assert same.cosine == pytest.approx(1.0)
    assert all(m.output_similarity[-1][-1] == pytest.approx(1.0) for m in same.modules)
    assert same.config == {}
    other = adapter(llama_base, tmp_path / "b", 1, target_modules=["v_proj"])
    with pytest.raises(ConfigError, match="no module in common"):
        compare(first, other)


def test_what_is_held_whole_is_told_where_it_differs(llama_base: Path, tmp_path: Path) -> None:
    first = adapter(llama_base, tmp_path / "a", 1, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    second = Path(shutil.copytree(first, tmp_path / "b"))
    assert compare(first, second).whole == []
    tensors = load_file(second / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] *= -1
    save_file(tensors, second / "adapter_model.safetensors")
    assert compare(first, second).whole == ["lm_head.weight"]
    plain = adapter(llama_base, tmp_path / "c", 1, target_modules=["q_proj"])
    assert compare(plain, first).whole == ["lm_head.weight", "model.norm.weight"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_dead_adapter_is_like_nothing(order: int, cli: WarmCli, llama_base: Path, tmp_path: Path) -> None:
    alive = adapter(llama_base, tmp_path / "a", 1, target_modules=["q_proj"])
    dead = Path(shutil.copytree(alive, tmp_path / "dead"))
    tensors = load_file(dead / "adapter_model.safetensors")
    save_file({k: v * ("lora_A" in k) for k, v in tensors.items()}, dead / "adapter_model.safetensors")
    said = cli("compare", *(alive, dead)[::order])
    assert "cosine of all updates together 0.000" in said.stdout, said.stderr


@pytest.mark.parametrize("dora_first", [True, False])
def test_dora_is_not_compared_by_a_part_of_it(dora_first: bool, llama_base: Path, tmp_path: Path) -> None:
    plain, dora = adapter(llama_base, tmp_path / "a", 1), adapter(llama_base, tmp_path / "b", 2, use_dora=True)
    with pytest.raises(ConfigError, match="b is DoRA, which changes the lengths"):
        compare(*((dora, plain) if dora_first else (plain, dora)))
