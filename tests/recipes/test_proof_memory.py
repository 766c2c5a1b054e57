"""A proof that fits where training fits: it says what the proof by whole models says, and costs nothing when it cannot run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CAUSAL, build_model, randomise
from torch import Tensor

from twofold.adapter.attach import attach, disabled, merge
from twofold.adapter.config import LoraConfig
from twofold.base.batch import Example, PackedBatch, pack
from twofold.base.load import load_base
from twofold.data.examples import DataConfig
from twofold.errors import BaseError
from twofold.events import Event, Warned, silent
from twofold.machine import memory_ran_out
from twofold.recipes import merge as merge_recipe
from twofold.recipes import proof
from twofold.recipes import train as train_recipe
from twofold.recipes.proof import WIDER, compared_rows, logits_at, verify_merge, within_memory
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.training.optim import TrainingConfig

pytest_plugins = ("tiny_fixtures",)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def adapted(family: str, dtype: torch.dtype) -> Any:
    model = build_model(family).to(dtype)
    attach(model, LoraConfig(r=2, target_modules="all-linear"))
    randomise((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return model


def batch() -> PackedBatch:
    ids = torch.randint(4, 64, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    return pack([Example(ids[:9], [True] * 9), Example(ids[9:], [True] * 11)])


def in_wide_copy(model: Any, rows: Tensor) -> Tensor:
    """The oracle: a copy of the model whose every weight is converted at once."""
    whole = copy.deepcopy(model)
    for parameter in whole.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, WIDER[model.dtype]))
    for module in whole.modules():
        if getattr(module, "merged", None) is not None:
            module.merged = module.merged.to(WIDER[model.dtype])
    return logits_at(whole, batch(), rows, 0).double()


@DTYPES
@pytest.mark.parametrize("family", CAUSAL)
def test_the_proof_finds_what_converting_and_merging_the_whole_model_finds(family: str, dtype: torch.dtype) -> None:
    model, rows = adapted(family, dtype), torch.arange(20)
    merged = copy.deepcopy(model)
    merge(merged)
    served, folded = (logits_at(m, batch(), rows, 0).double() for m in (model, merged))
    apart, together = in_wide_copy(model, rows), in_wide_copy(merged, rows)
    with disabled(model):
        control = in_wide_copy(model, rows)
    tolerance = (served - apart).abs().max() + (folded - together).abs().max()
    rounding = 1e-12 if dtype is torch.float32 else 1e-5
    found = verify_merge(model, batch(), 0)
    assert found.max_abs_logit_difference == pytest.approx((apart - together).abs().max().item(), abs=rounding)
    assert found.tolerance == pytest.approx(tolerance.item(), abs=2 * rounding)
    assert found.control_difference == pytest.approx((control - together).abs().max().item(), abs=rounding)
    assert found.top1_agreement == (apart.argmax(-1) == together.argmax(-1)).double().mean().item()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_where_logits_are_many_rows_all_over_the_batch_are_compared(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(family, torch.float32)
    every = compared_rows(model, batch())
    assert every.tolist() == list(range(20))
    monkeypatch.setattr(proof, "PROOF_LOGITS", 6 * 64 + 63)
    chosen = compared_rows(model, batch())
    assert chosen.tolist() == [2, 5, 9, 12, 15, 19]
    torch.testing.assert_close(
        logits_at(model, batch(), chosen, 0), logits_at(model, batch(), every, 0)[chosen], rtol=1e-5, atol=1e-6
    )
    assert verify_merge(model, batch(), 0).passed


# ---------------------------------------------------------------------------------------------- memory runs out


def too_much(*_: Any, **__: Any) -> Any:
    """What PyTorch itself does when there is not enough."""
    return torch.empty(1 << 50, dtype=torch.float64)


def test_want_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as real:
        too_much()
    wrapped = BaseError("cannot load")
    wrapped.__cause__ = real.value
    assert all(map(memory_ran_out, (real.value, wrapped, MemoryError(), torch.OutOfMemoryError("CUDA out of memory"))))
    assert not any(map(memory_ran_out, (RuntimeError("shapes do not match"), BaseError("no base"), None)))


def test_other_errors_in_a_proof_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="size"):
        within_memory(lambda: torch.ones(2) + torch.ones(3), silent)


@pytest.fixture
def config(llama_base: Path, train_file: Path, held_out_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        base=str(llama_base),
        data=DataConfig(train=str(train_file), evaluation=str(held_out_file)),
        adapter=AdapterSettings(r=4),
        training=TrainingConfig(batch_size=6, max_steps=2),
        output=str(tmp_path / "run"),
        dtype="float32",
        device="cpu",
    )


@pytest.mark.parametrize("where", ["verify_merge", "folding"])
def test_a_run_whose_proof_does_not_fit_is_reported_all_the_same(
    config: TrainConfig, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Event] = []
    monkeypatch.setattr(train_recipe, where, too_much)
    train_recipe.train(config, heard.append)
    report = json.loads((Path(config.output) / "report.json").read_text())
    assert report["verification"] is None
    assert report["evaluation"]["merged"] is None
    assert report["evaluation"]["adapter"]["loss"] > 0
    assert report["base_unchanged"] is True
    assert "memory ran out" in report["verification_skipped"]
    warned = [e.record()["text"] for e in heard if isinstance(e, Warned)]
    assert any("nothing is proved: memory ran out" in text for text in warned)
    assert "Not proved: memory ran out" in (Path(config.output) / "report.html").read_text()


def test_a_proof_that_ran_says_that_nothing_was_skipped(config: TrainConfig) -> None:
    report = train_recipe.train(config)
    assert report["verification_skipped"] is None
    assert report["verification"]["tolerance"] > 0
    assert report["evaluation"]["merged"]["loss"] == pytest.approx(report["evaluation"]["adapter"]["loss"], rel=1e-4)


def test_a_merge_whose_proof_does_not_fit_is_written_all_the_same(
    llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(llama_base), "float32", "cpu")
    attach(base.model, LoraConfig(r=4))
    randomise((n, p) for n, p in base.model.named_parameters() if p.requires_grad)
    heard: list[Event] = []
    loader: Callable[..., Any] = too_much
    monkeypatch.setattr(merge_recipe, "load_base", loader)
    found = merge_recipe.merge_checkpoint(base, tmp_path / "merged", emit=heard.append)
    assert found["verification"] is None
    assert "memory ran out" in found["verification_skipped"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert any(isinstance(e, Warned) for e in heard)
