"""TensorBoard and Weights & Biases as subscribers; each needs its own package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from twofold.errors import ConfigError
from twofold.events import Evaluated, Event, Step


def _scalars(event: Event) -> tuple[int, dict[str, float]] | None:
    if isinstance(event, Step):
        names = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory_bytes")
        return event.step, {f"train/{n}": float(getattr(event, n)) for n in names}
    if isinstance(event, Evaluated):
        return event.step, {"evaluation/loss": event.loss, "evaluation/token_accuracy": event.token_accuracy}
    return None


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"tracker '{package}' needs its package: pip install twofold[{package}]") from error


class TensorBoard:
    """Writes scalars to the run folder's `tensorboard/`."""

    def __init__(self, run: Path) -> None:
        self._writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run / "tensorboard"))

    def __call__(self, event: Event) -> None:
        found = _scalars(event)
        if found:
            for name, value in found[1].items():
                self._writer.add_scalar(name, value, found[0])
            self._writer.flush()


class WeightsAndBiases:
    """Logs scalars to a run named after the run folder."""

    def __init__(self, run: Path) -> None:
        self._run = _module("wandb", "wandb").init(project="twofold", name=run.name, dir=str(run))

    def __call__(self, event: Event) -> None:
        found = _scalars(event)
        if found:
            self._run.log(found[1], step=found[0])
