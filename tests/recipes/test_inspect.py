"""`inspect`: figures of the update, as numpy's SVD of the whole product finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.base.load import load_base
from twofold.errors import AdapterFileError
from twofold.inspection.report import AdapterReport
from twofold.recipes.inspect import inspect_adapter

pytest_plugins = ("tiny_fixtures",)

PREFIX = "base_model.model."


def adapter(folder: Path, output: Path, fill: float = 0.1, **settings: Any) -> Path:
    base = load_base(str(folder), "float32", "cpu")
    attach(base.model, LoraConfig(**{"r": 6, "lora_alpha": 9, **settings}))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in base.model.named_parameters():
        if name.endswith(".B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * fill
    return save_adapter(base.model, output)


def notable(report: AdapterReport) -> list[str]:
    """Codes of what is more than a note."""
    return [f.code for f in report.findings if f.severity != "note"]


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 1.5), ({"use_rslora": True}, 9 / 6**0.5), ({"rank_pattern": {"q_proj": 2}}, None)],
    ids=["plain", "rslora", "pattern"],
)
def test_figures_are_those_of_the_whole_product(
    settings: dict[str, Any], scale: float | None, llama_base: Path, tmp_path: Path
) -> None:
    path = adapter(llama_base, tmp_path / "adapter", **settings)
    tensors, report = load_file(path / "adapter_model.safetensors"), inspect_adapter(path)
    assert len(report.modules) == 14
    for module in report.modules:
        a, b = (tensors[f"{PREFIX}{module.name}.lora_{x}.weight"].double().numpy() for x in "AB")
        r = a.shape[0]
        expected = scale if scale is not None else 9 / r
        values = np.linalg.svd(expected * b @ a, compute_uv=False)[:r]
        energy = np.cumsum(values**2) / np.sum(values**2)
        shares = values / values.sum()
        assert (module.r, module.scale) == (r, pytest.approx(expected))
        assert module.frobenius_norm == pytest.approx(np.linalg.norm(expected * b @ a))
        assert module.spectral_norm == pytest.approx(values[0])
        assert module.stable_rank == pytest.approx(np.sum(values**2) / values[0] ** 2)
        assert module.effective_rank == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
        assert module.energy_rank_90 == int(np.searchsorted(energy, 0.90)) + 1
        assert module.energy_rank_95 == int(np.searchsorted(energy, 0.95)) + 1
        assert module.energy_rank_99 == int(np.searchsorted(energy, 0.99)) + 1
    assert report.suggested_rank == max(m.energy_rank_99 for m in report.modules)
    assert notable(report) == []


def test_one_direction_is_seen_as_one(llama_base: Path, tmp_path: Path) -> None:
    path = adapter(llama_base, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = {k: v * (torch.arange(6) == 2)[None] if "lora_B" in k else v for k, v in load_file(path).items()}
    save_file(tensors, path)
    report = inspect_adapter(path.parent)
    assert report.suggested_rank == 1
    assert all(m.stable_rank == pytest.approx(1, abs=1e-6) for m in report.modules)


def test_an_adapter_fresh_from_its_start_is_dead_everywhere(llama_base: Path, tmp_path: Path) -> None:
    report = inspect_adapter(adapter(llama_base, tmp_path / "adapter", fill=0.0))
    assert notable(report) == ["dead"] * 14
    assert report.suggested_rank == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(poison: float, llama_base: Path, tmp_path: Path) -> None:
    path = adapter(llama_base, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj"
    tensors[f"{PREFIX}{name}.lora_A.weight"][0, 0] = poison
    save_file(tensors, path)
    finding, *others = inspect_adapter(path.parent).findings
    assert {f.severity for f in others} == {"note"}
    assert (finding.severity, finding.code) == ("error", "not-finite")
    assert name in finding.message


def test_an_update_beyond_float32_is_found_and_not_held_beside_a_base(llama_base: Path, tmp_path: Path) -> None:
    path = adapter(llama_base, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors, name = load_file(path), "model.layers.1.self_attn.k_proj"
    for x in "AB":
        tensors[f"{PREFIX}{name}.lora_{x}.weight"] *= 1e25
    save_file(tensors, path)
    report = inspect_adapter(path.parent, str(llama_base), intruders=2)
    assert [(f.code, name in f.message) for f in report.findings if f.severity == "error"] == [("not-finite", True)]
    beside = {m.name: m.beside_base for m in report.modules}
    assert beside.pop(name) is None
    assert all(beside.values())


def test_embeddings_are_inspected_too(llama_base: Path, tmp_path: Path) -> None:
    path = adapter(llama_base, tmp_path / "adapter", target_modules=["embed_tokens"])
    tensors = load_file(path / "adapter_model.safetensors")
    (module,) = inspect_adapter(path).modules
    a, b = (tensors[f"{PREFIX}model.embed_tokens.lora_embedding_{x}"].double().numpy() for x in "AB")
    assert module.frobenius_norm == pytest.approx(np.linalg.norm(1.5 * b @ a))


def test_half_a_pair_of_factors_is_an_error(llama_base: Path, tmp_path: Path) -> None:
    path = adapter(llama_base, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(AdapterFileError, match=r"up_proj' has lora_A.weight without its partner"):
        inspect_adapter(path.parent)


def test_the_lengths_of_dora_are_said_to_be_left_out(llama_base: Path, tmp_path: Path) -> None:
    report = inspect_adapter(adapter(llama_base, tmp_path / "a", use_dora=True))
    assert notable(report) == ["dora"]
    assert notable(inspect_adapter(adapter(llama_base, tmp_path / "b"))) == []
