"""The proof of a run: it passes for a right merge and fails for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from twofold.adapter.attach import attach, disabled
from twofold.adapter.config import LoraConfig
from twofold.base.load import load_base
from twofold.errors import ProofError
from twofold.events import Event
from twofold.recipes.proof import base_digest, proof_batch, verify_merge

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def adapted(llama_base: Path, held_out_file: Path) -> tuple[Any, Any]:
    """A model with an adapter that says something, and tokens to compare it on."""
    base = load_base(str(llama_base), "float32", "cpu")
    attach(base.model, LoraConfig(r=4))
    for name, parameter in base.model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.02)
    rows = map(json.loads, held_out_file.read_text().splitlines())
    return base.model, proof_batch([e for r in rows for e in base.renderer.chat(r["messages"])], base.device)


def test_the_proof_fails_when_one_merged_weight_is_spoiled(adapted: tuple[Any, Any]) -> None:
    from twofold.merging.checkpoint import merged_state

    model, batch = adapted
    merged = AutoModelForCausalLM.from_config(model.config).eval()
    merged.load_state_dict(merged_state(model))
    assert verify_merge(model, batch, 0, merged).passed
    assert verify_merge(model, batch, 0).passed
    with torch.no_grad():
        merged.model.layers[1].mlp.down_proj.weight[3, 5] += 0.01
    spoiled = verify_merge(model, batch, 0, merged)
    assert not spoiled.passed
    with pytest.raises(
        ProofError, match="the merged model differs from the adapter by more than the model's own noise"
    ):
        spoiled.require("the merged model")


def test_the_proof_fails_for_an_adapter_that_changes_nothing(llama_base: Path, adapted: tuple[Any, Any]) -> None:
    """Merged and adapter agree then, but so would anything."""
    _, batch = adapted
    base = load_base(str(llama_base), "float32", "cpu")
    attach(base.model, LoraConfig(r=4))
    found = verify_merge(base.model, batch, 0)
    assert found.max_abs_logit_difference <= found.tolerance
    assert not found.passed
    said: list[Event] = []
    found.require("the merged model", said.append)
    assert "changes no logit by more than" in said[0].record()["text"]


def test_the_base_digest_sees_one_changed_value_and_no_adapter(adapted: tuple[Any, Any]) -> None:
    model, _ = adapted
    before = base_digest(model)
    with disabled(model):
        assert base_digest(model) == before
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.shares["default"].A.add_(1.0)
        assert base_digest(model) == before
        model.model.layers[0].self_attn.q_proj.base.weight[0, 0] += 1e-6
    assert base_digest(model) != before
