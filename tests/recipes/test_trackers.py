"""Trackers get every step and evaluation, read back from the files that they write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import Heard, changed

from twofold.events import Step
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import train

pytest_plugins = ("tiny_fixtures", "tiny_runs")


def test_tensorboard_gets_every_step_and_evaluation(config: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    heard = Heard()
    train(changed(replace(config, trackers=("tensorboard",)), max_steps=4, evaluate_every=2), heard)
    found = EventAccumulator(str(Path(config.output) / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in found.Scalars("train/loss")] == [
        (s.step, pytest.approx(s.loss, rel=1e-6)) for s in heard.of(Step)
    ]
    assert [s.step for s in found.Scalars("evaluation/loss")] == [2, 4]
