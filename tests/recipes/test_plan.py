"""`plan`: parameters exactly as training will have them, from shapes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.target import module_shapes
from twofold.base.load import load_base
from twofold.errors import BaseError, TargetError
from twofold.planning.memory import Architecture, StepShape, plan_memory
from twofold.planning.parameters import ParameterPlan, plan_parameters
from twofold.recipes.plan import plan

pytest_plugins = ("tiny_fixtures",)


def planned(base: Path | str, config: LoraConfig, **changes: Any) -> dict[str, Any]:
    settings = {"dtype": torch.float32, "sequence_length": 64, "batch_size": 2, "gradient_checkpointing": False}
    return plan(str(base), config, **{**settings, **changes})


CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "attention": {"r": 3, "target_modules": "attention"},
    "pattern": {"rank_pattern": {"q_proj": 2, "down_proj": 9}},
    "layer": {"layers_to_transform": [1]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "excluded": {"exclude_modules": ["o_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
}


@pytest.mark.parametrize("kind", ["llama_base", "tied_base", "gpt2_base"])
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_the_plan_counts_what_attaching_makes(
    kind: str, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    config = LoraConfig(**settings)
    base = load_base(str(folder), "float32", "cpu")
    try:
        summary = attach(base.model, config)
    except TargetError:
        with pytest.raises(TargetError):
            planned(folder, config)
        return
    found = planned(folder, config)["parameters"]
    assert found["trainable"] == summary.trainable
    assert found["base"] == summary.base
    assert found["modules"] == summary.modules - ("modules_to_save" in settings)
    assert found["fraction"] == summary.fraction


def test_a_square_of_4096_at_rank_8_has_65536() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    found = plan_parameters(LoraConfig(r=8, target_modules=["0"]), module_shapes(model), 4096 * 4096)
    assert found.trainable == 65_536
    assert found.base == 256 * found.trainable


def test_planning_reads_no_weights(llama_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama_base / "config.json").read_bytes())
    assert planned(tmp_path, LoraConfig()) == planned(llama_base, LoraConfig()) | {"base": str(tmp_path)}


def test_memory_follows_what_it_is_made_of(llama_base: Path) -> None:
    one = planned(llama_base, LoraConfig())["memory"]
    terms = [v for k, v in one.items() if k != "total"]
    assert one["total"]["expected"] == sum(terms)
    assert one["total"]["low"] < one["total"]["expected"] < one["total"]["high"]
    assert one["optimizer"] == 2 * one["gradients"] == 2 * one["adapter"]
    half = planned(llama_base, LoraConfig(), dtype=torch.bfloat16)["memory"]
    assert half["weights"] * 2 == one["weights"]
    assert half["adapter"] == one["adapter"]
    double = planned(llama_base, LoraConfig(), batch_size=4)["memory"]
    assert double["activations"] == pytest.approx(2 * one["activations"], rel=0.01)
    assert double["weights"] == one["weights"]
    less = planned(llama_base, LoraConfig(), gradient_checkpointing=True)["memory"]
    assert less["activations"] < one["activations"]


def test_the_proof_counts_only_where_forming_a_merged_weight_outgrows_training() -> None:
    """For a model of 8B in bfloat16; its head, 128,256 x 4096, takes 10 bytes a value while it is merged."""
    shape = Architecture(
        layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        q_width=4096,
        kv_width=1024,
        vocabulary=128256,
        fast_path=True,
    )
    step = StepShape(tokens=256, length=256, supervised_tokens=200, element_bytes=2, recompute=False)
    layers = ParameterPlan(
        base=8_030_261_248, trainable=42_000_000, adapted_base=7 * 10**9, modules=224, largest=14336 * 4096
    )
    assert plan_memory(layers, shape, step, 3584).proof == 0
    head = plan_memory(replace(layers, largest=128256 * 4096), shape, step, 3584)
    freed = head.gradients + head.optimizer + head.activations + head.logits
    assert head.proof + freed == pytest.approx(10 * 128256 * 4096, rel=0.05)


def test_the_path_is_foretold(llama_base: Path, gpt2_base: Path) -> None:
    assert planned(llama_base, LoraConfig())["path"] == "fast"
    assert planned(gpt2_base, LoraConfig())["path"] == "plain"


def test_what_cannot_be_planned_is_refused(llama_base: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="q_proj"):
        planned(llama_base, LoraConfig(target_modules=["q_porj"]))
    with pytest.raises(BaseError):
        planned(tmp_path, LoraConfig())
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(BaseError, match="cannot read the configuration"):
        planned(tmp_path, LoraConfig())
