"""Which models take the fast path, and why the others do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from families import CAUSAL, DESCRIBED, GROUPED, build_model
from losses import adapted, by_hand, some_examples
from torch import Tensor, nn

from twofold.base.batch import pack
from twofold.base.blocks import NotDescribed, describe
from twofold.training.objective import (
    FastObjective,
    Objective,
    PlainObjective,
    objective_for,
)


def reason_of(model: Any) -> str:
    """Why the plain path was taken."""
    described = describe(model)
    assert isinstance(described, NotDescribed)
    objective: Objective = objective_for(model, 0, recompute=False)
    assert isinstance(objective, PlainObjective)
    assert objective.path == f"plain path: {described.reason}"
    return described.reason


@pytest.mark.parametrize("family", DESCRIBED)
def test_described_families_take_the_fast_path(family: str) -> None:
    objective = objective_for(adapted(family), 0, recompute=False)
    assert isinstance(objective, FastObjective)
    assert "fast" in objective.path


@pytest.mark.parametrize("family", [f for f in CAUSAL if f not in DESCRIBED])
def test_other_families_take_the_plain_path(family: str) -> None:
    model = build_model(family)
    assert type(model).__name__ in reason_of(model) or "class" in reason_of(model)


def test_a_rotary_embedding_that_grows_with_the_batch_is_not_described() -> None:
    turning = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, rope_parameters=turning)).eval()
    assert "length of the batch" in reason_of(model)
    examples = some_examples(10, 6)
    found = objective_for(model, 0, recompute=False)(pack(examples)).loss_sum
    torch.testing.assert_close(found, by_hand(model, examples)[0].float(), rtol=1e-5, atol=1e-5)


def test_hooked_and_patched_modules_are_not_described() -> None:
    hooked, early, patched = (build_model("llama") for _ in range(3))
    hooked.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, a, y: y * 2)
    early.model.layers[0].register_forward_pre_hook(lambda m, a: None)
    patched.model.layers[0].self_attn.forward = patched.model.layers[0].self_attn.forward
    assert "'model.layers.1.mlp.up_proj' is hooked" in reason_of(hooked)
    assert "'model.layers.0' is hooked" in reason_of(early)
    assert "'model.layers.0.self_attn'" in reason_of(patched)
    examples = some_examples(6)
    torch.testing.assert_close(
        objective_for(hooked, 0, recompute=False)(pack(examples)).loss_sum, by_hand(hooked, examples)[0].float()
    )


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_subclassed_projections_norms_and_activations_are_not_described() -> None:
    doubled, normed, active = (build_model("llama") for _ in range(3))
    doubled.model.layers[0].mlp.down_proj = _Doubled(48, 32, bias=False)
    normed.model.norm = nn.LayerNorm(32)
    active.config.hidden_act = "gelu"
    assert "_Doubled" in reason_of(doubled)
    assert "norm" in reason_of(normed)
    assert "gelu" in reason_of(active)
