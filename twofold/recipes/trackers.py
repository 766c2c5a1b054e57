"""TensorBoard and Weights & Biases as subscribers, for the length of a run; each needs its own package."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twofold.errors import ConfigError
from twofold.events import Emit, Evaluated, Event, Step


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


@contextmanager
def tensorboard(run: Path) -> Iterator[Emit]:
    """Writes scalars to the run folder's `tensorboard/`.

    Raises:
        ConfigError: its package is not installed.
    """
    with _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run / "tensorboard")) as writer:

        def emit(event: Event) -> None:
            found = _scalars(event)
            if found:
                for name, value in found[1].items():
                    writer.add_scalar(name, value, found[0])
                writer.flush()

        yield emit


@contextmanager
def weights_and_biases(run: Path) -> Iterator[Emit]:
    """Logs scalars to the run folder's `wandb/`, without network or login unless `WANDB_MODE` asks for them.

    Raises:
        ConfigError: its package is not installed, or it cannot begin: no login, where one was asked for.
    """
    wandb = _module("wandb", "wandb")
    try:
        with _begun(wandb, run) as begun:

            def emit(event: Event) -> None:
                found = _scalars(event)
                if found:
                    begun.log(found[1], step=found[0])

            yield emit
    finally:
        if wandb.run is None:  # a run of the caller's own still needs the process that serves both
            wandb.teardown()


def _begun(wandb: Any, run: Path) -> Any:
    quiet = wandb.Settings(silent=True, console="off")
    mode = os.environ.get("WANDB_MODE", "offline")
    try:
        with _cache_in(run / "wandb" / "cache"):
            return wandb.init(project="twofold", name=run.name, dir=str(run), mode=mode, settings=quiet)
    except wandb.Error as error:
        raise ConfigError(f"tracker 'wandb' cannot begin: {error}; or unset WANDB_MODE to stay offline") from error


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Its process writes its own log to a cache, which only the environment can move."""
    before = os.environ.get("WANDB_CACHE_DIR")
    os.environ["WANDB_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_CACHE_DIR"]
        if before is not None:
            os.environ["WANDB_CACHE_DIR"] = before
