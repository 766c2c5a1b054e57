"""What the tests of training runs share: a subscriber, changes of a configuration, and what is read back of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from twofold.events import Event
from twofold.recipes.settings import TrainConfig

KILL_AT_STEP = """
import os, signal, twofold.training.loop as loop
real = loop.learning_rate
def rate(config, step, steps):
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(config, step, steps)
loop.learning_rate = rate
"""
"""Python that a command runs first: at the step it is filled in with, its process is gone."""


class Heard(list[Event]):
    """A subscriber that keeps what it hears."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [e for e in self if isinstance(e, kind)]


def changed(config: TrainConfig, **training: Any) -> TrainConfig:
    return replace(config, training=replace(config.training, **training))


def adapter_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def load_report(run: Path) -> Any:
    return json.loads((run / "preflight.json").read_text())


def edited(config: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the configuration with some keys changed, `a__b` meaning `b` inside `a`."""
    settings = yaml.safe_load(config.read_text()) | {"output": str(folder / "run")}
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        settings[outer] = {**settings.get(outer, {}), inner: value} if inner else value
    path = folder / "edited.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
