"""Adapters that PEFT wrote, combined and resized here, and read by PEFT again: what they add to the base is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build_model, inputs, randomise
from interchange_cases import CASES as KINDS
from tiny_adapters import learned
from torch import Tensor

import twofold
from twofold.merging.resize import Size
from twofold.recipes.inspect import compare, inspect_adapter
from twofold.recipes.resize import resize

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
MIXTURE = next(kind for kind in KINDS if kind.name == "experts in three dimensions")
TIED = {
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "an expression": {"target_modules": r".*(q_proj|embed_tokens)"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
}


def base(family: str) -> Any:
    return MIXTURE.build() if family == "mixture" else build_model(family)


def in_peft(path: Path, family: str, seed: int = 1, **settings: Any) -> Tensor:
    """The logits of a random adapter that PEFT writes."""
    model = peft.get_peft_model(base(family), peft.LoraConfig(r=2, lora_alpha=6, **settings)).eval()
    randomise(learned(model), seed=seed, scale=0.1)
    model.save_pretrained(path)
    return said(model)


def said(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model.base_model.model)).logits


def read(path: Path, family: str) -> Tensor:
    return said(peft.PeftModel.from_pretrained(base(family), path).eval())


@pytest.mark.parametrize("kept", TIED)
def test_modules_that_are_kept_tied_go_on_together(kept: str, tmp_path: Path) -> None:
    expected = in_peft(tmp_path / "a", "llama-tied", ensure_weight_tying=True, **TIED[kept])
    twofold.combine({tmp_path / "a": 1.0}, tmp_path / "same")
    resize(tmp_path / "a", tmp_path / "resized", Size(energy=1.0))
    for made in ("same", "resized"):
        torch.testing.assert_close(read(tmp_path / made, "llama-tied"), expected, rtol=1e-4, atol=1e-4)
    assert not [f for f in inspect_adapter(tmp_path / "a").findings if f.severity == "error"]


def test_an_adapter_that_keeps_ties_beside_one_that_does_not(tmp_path: Path) -> None:
    in_peft(tmp_path / "kept", "llama-tied", target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    in_peft(tmp_path / "free", "llama-tied", 2, target_modules=["lm_head"])
    twofold.combine({tmp_path / "kept": 0.5, tmp_path / "free": 2.0}, tmp_path / "both")
    model = build_model("llama-tied")
    twofold.load_adapter(model, tmp_path / "kept", "kept")
    twofold.load_adapter(model, tmp_path / "free", "free")
    twofold.activate(model, {"kept": 0.5, "free": 2.0})
    expected = model(**inputs(model)).logits.detach()
    torch.testing.assert_close(read(tmp_path / "both", "llama-tied"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patterns", [{}, {"alpha_pattern": {"down_proj": 8}}, {"rank_pattern": {"gate.weight": 1}}])
def test_a_router_among_all_linear_keeps_its_factors(patterns: dict[str, Any], tmp_path: Path) -> None:
    """PEFT then names the router by the end of its path and the experts' parameters by a word that may be any module's."""
    expected = in_peft(tmp_path / "a", "mixture", target_modules="all-linear", **patterns)
    twofold.combine({tmp_path / "a": 1.0}, tmp_path / "same")
    twofold.combine({tmp_path / "same": 1.0}, tmp_path / "again")
    resize(tmp_path / "a", tmp_path / "resized", Size(energy=1.0))
    for made in ("same", "again", "resized"):
        torch.testing.assert_close(read(tmp_path / made, "mixture"), expected, rtol=1e-4, atol=1e-4)
        assert compare(tmp_path / "a", tmp_path / made).cosine == pytest.approx(1)
    base("mixture").save_pretrained(tmp_path / "base")
    findings = inspect_adapter(tmp_path / "a", str(tmp_path / "base")).findings
    assert not [f for f in findings if f.severity == "error"]
