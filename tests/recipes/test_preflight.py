"""What a run warns about before it starts."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_base import POSITIONS, pairs, write_jsonl
from tiny_runs import Heard, load_report

from twofold.data.examples import DataConfig
from twofold.errors import ConfigError
from twofold.events import Message
from twofold.recipes.plan import PlanSettings, plan
from twofold.recipes.preflight import Preflight
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.train import dry_run, train
from twofold.training.optim import TrainingConfig

pytest_plugins = ("tiny_fixtures",)


def foreseen(base: Path, data: Path, adapter: dict[str, Any], **training: Any) -> Preflight:
    return dry_run(
        TrainConfig(
            base=str(base),
            data=DataConfig(train=str(data)),
            adapter=AdapterSettings(**adapter),
            training=TrainingConfig(batch_size=4, **training),
            dtype="float32",
            device="cpu",
        )
    )


@pytest.mark.parametrize(
    ("adapter", "rate", "said"),
    [
        ({"r": 16, "lora_alpha": 32}, 2e-3, []),
        ({"r": 16, "lora_alpha": 32}, 1e-6, ["learning_rate 1e-06"]),
        ({"r": 16, "lora_alpha": 32}, 1.0, ["learning_rate 1 "]),
        ({"r": 64, "lora_alpha": 2}, 2e-2, ["2312.03732"]),
    ],
)
def test_settings_far_from_known_good_ones_are_named(
    llama_base: Path, train_file: Path, adapter: dict[str, Any], rate: float, said: list[str]
) -> None:
    found = foreseen(llama_base, train_file, adapter, learning_rate=rate).warnings
    assert len(found) == len(said)
    assert all(s in f for s, f in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"freeze_a": True, "target_modules": ("q_proj", "embed_tokens")}, "freeze_a is defined for linear layers"),
        ({"init_lora_weights": "pissa", "r": 40}, "pissa takes 40 directions out of '.*q_proj', which has but 32"),
        ({"init_lora_weights": "lora_ga", "r": 20}, r"takes 40 directions \(2 r, and r is 20\) out of '.*q_proj'"),
        ({"init_lora_weights": "loftq"}, "this base is not quantised"),
    ],
)
def test_a_dry_run_and_a_plan_refuse_what_a_training_would(
    llama_base: Path, train_file: Path, adapter: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        foreseen(llama_base, train_file, adapter)
    if adapter.get("init_lora_weights") != "loftq":  # a plan does not know how a base will be packed
        with pytest.raises(ConfigError, match=said):
            plan(PlanSettings(base=str(llama_base), **adapter))


def test_states_are_remembered_on_the_fast_path_alone(llama_base: Path, gpt2_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": q, "completion": a} for q, a in pairs(8)])
    fast, plain = (foreseen(b, data, {}, cache_frozen=True, learning_rate=2e-3) for b in (llama_base, gpt2_base))
    assert (fast.remembered, fast.warnings) == (fast.train.tokens * 32 * 4, [])
    assert plain.remembered == 0
    (said,) = plain.warnings
    assert said.startswith(
        "training.cache_frozen has no effect: only the fast path remembers states, and GPT2LMHeadModel"
    )


def test_the_micro_batch_decides_the_memory_and_the_batch_the_time(llama_base: Path, train_file: Path) -> None:
    whole = foreseen(llama_base, train_file, {})
    halves = foreseen(llama_base, train_file, {}, micro_batch_size=2)
    assert halves.memory.terms["activations"] < whole.memory.terms["activations"]
    assert halves.memory.terms["weights"] == whole.memory.terms["weights"]
    assert halves.seconds > 0


def test_memory_counts_what_the_process_holds_before_it_loads_a_base(llama_base: Path, train_file: Path) -> None:
    """As a run's own libraries, or whatever else a program that trains has in memory."""

    def runtime() -> int:
        return foreseen(llama_base, train_file, {"r": 4}).memory.terms["runtime"]

    runtime()
    before = runtime()
    ballast = mmap.mmap(-1, 1 << 28)  # not from the allocator, which may still hold what an earlier test gave back
    torch.frombuffer(ballast, dtype=torch.uint8).fill_(1)
    assert runtime() - before == pytest.approx(len(ballast), rel=0.2)


@pytest.mark.parametrize("streaming", [False, True])
def test_examples_beyond_the_positions_that_a_base_has_learned_are_left_out(
    gpt2_base: Path, tmp_path: Path, streaming: bool
) -> None:
    heard = Heard()
    rows = [{"prompt": "near", "completion": "by"}, {"prompt": "one two " * (POSITIONS // 4), "completion": "far"}]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    config = TrainConfig(
        base=str(gpt2_base),
        data=DataConfig(train=str(data), streaming=streaming),
        training=TrainingConfig(batch_size=2, max_steps=2),
        output=str(tmp_path / "run"),
        dtype="float32",
        device="cpu",
        verify=False,
    )
    assert train(config, heard)["steps"] == (2 if streaming else 1)
    assert f"data.max_length is {POSITIONS}, for this base takes no more tokens" in [e.text for e in heard.of(Message)]
    assert load_report(tmp_path / "run")["train"]["too_long"] == 1
