"""The usual loop's formulas against what PEFT measured and published.

method_comparison/MetaMathQA/results of huggingface/peft: Llama-3.2-3B in bfloat16, batches of 4 with up to 768 tokens, no
gradient checkpointing; the largest memory that torch had reserved, without the CUDA context.
"""

from __future__ import annotations

from typing import Any

import pytest

from twofold.recipes.plan import PlanSettings, costs, outline

RUNS: dict[str, tuple[dict[str, Any], int, float]] = {
    "rank 32 on queries and values": ({"r": 32, "target_modules": ["q_proj", "v_proj"]}, 9_175_040, 22.29e9),
    "rank 64 on queries and values": ({"r": 64, "target_modules": ["q_proj", "v_proj"]}, 18_350_080, 22.55e9),
    "rank 10 on the MLPs": ({"r": 10, "target_modules": "mlp"}, 9_461_760, 24.70e9),
    "DoRA": ({"r": 32, "target_modules": ["q_proj", "v_proj"], "use_dora": True}, 9_289_728, 24.48e9),
    "LoRA-FA": ({"r": 32, "target_modules": ["q_proj", "v_proj"], "freeze_a": True}, 3_670_016, 22.23e9),
}


@pytest.mark.parametrize(("adapter", "trainable", "reserved"), RUNS.values(), ids=RUNS)
def test_memory_is_within_five_percent_of_the_published_runs(
    adapter: dict[str, Any], trainable: int, reserved: float
) -> None:
    step = {"batch_size": 4, "sequence_length": 768}
    settings = PlanSettings(base="llama-3.2-3b", loop="peft", device="cuda", **step, **adapter)
    parameters, memory = costs(outline(settings.base), settings)
    assert parameters.trainable == trainable
    assert memory.expected - memory.terms["runtime"] == pytest.approx(reserved, rel=0.05)
