"""What the tests of training runs share: a configuration of a second's training, and what is read back of a run.

A test file says `pytest_plugins = ("tiny_fixtures", "tiny_runs")` and asks for `config` by name.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from twofold.data.examples import DataConfig
from twofold.events import Event
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.training.optim import TrainingConfig

TRAINING = TrainingConfig(batch_size=6, epochs=4, learning_rate=0.02)


class Heard(list[Event]):
    """A subscriber that keeps what it hears."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [e for e in self if isinstance(e, kind)]


@pytest.fixture
def config(llama_base: Path, train_file: Path, held_out_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        base=str(llama_base),
        data=DataConfig(train=str(train_file), evaluation=str(held_out_file)),
        adapter=AdapterSettings(r=4),
        training=TRAINING,
        output=str(tmp_path / "run"),
        dtype="float32",
        device="cpu",
    )


def changed(config: TrainConfig, **training: Any) -> TrainConfig:
    return replace(config, training=replace(config.training, **training))


def adapter_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def load_report(run: Path) -> Any:
    return json.loads((run / "preflight.json").read_text())
