"""Patterns and targets in adapter files mean to PEFT, and to Twofold again, what they meant when they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build_model, logits, randomise
from tiny_adapters import learned
from torch import Tensor, nn

from twofold.adapter.attach import attach, shares
from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.files import load_adapter, save_adapter

OVERLAPPING = {
    "rank_pattern": {"q_proj": 3, r".*proj": 5},
    "alpha_pattern": {r"layers\.0\..*": 9, "q_proj": 16, ".*": 4},
}


@pytest.mark.parametrize("reader", ["peft", "twofold"])
def test_overlapping_patterns_keep_their_meaning_although_files_are_sorted(reader: str, tmp_path: Path) -> None:
    model = build_model("llama")
    config = LoraConfig(r=2, target_modules=("q_proj", "v_proj", "up_proj"), **OVERLAPPING)  # type: ignore[arg-type]
    attach(model, config)
    randomise(learned(model))
    expected = {n: resolve(config, n) for n in shares(model, "default")}
    assert {v.alpha for v in expected.values()} == {9, 16, 4}
    path = save_adapter(model, tmp_path / "a")
    again: Any = build_model("llama")
    if reader == "twofold":
        load_adapter(again, path)
        path = save_adapter(again, tmp_path / "b")
        again = build_model("llama")
        load_adapter(again, path)
        found = {n: (s.A.shape[0], s.scale) for n, s in shares(again, "default").items()}  # type: ignore[union-attr, index]
    else:
        again = peft.PeftModel.from_pretrained(again, path).eval()
        again.save_pretrained(tmp_path / "b")
        again = peft.PeftModel.from_pretrained(build_model("llama"), tmp_path / "b").eval()
        layers = {n.removeprefix("base_model.model."): m for n, m in again.named_modules() if hasattr(m, "lora_A")}
        found = {n: (m.r["default"], m.scaling["default"]) for n, m in layers.items()}
    assert found == {n: (v.r, v.scale) for n, v in expected.items()}
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


class _Nested(nn.Module):
    """A module's whole name that is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner["proj"](self.proj(x))
        return y


@pytest.mark.parametrize("reader", ["peft", "twofold"])
def test_targets_that_no_list_of_endings_can_tell_apart_survive(reader: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, again = _Nested(), _Nested()
    again.load_state_dict(model.state_dict())
    attach(model, LoraConfig(r=2, target_modules="proj"))
    assert list(shares(model, "default")) == ["proj"]
    randomise(learned(model))
    x = torch.randn(3, 4)
    expected = model(x)
    path = save_adapter(model, tmp_path / "a")
    if reader == "twofold":
        load_adapter(again, path)
    else:
        again = peft.PeftModel.from_pretrained(again, path)  # type: ignore[assignment]
    torch.testing.assert_close(again(x), expected)
