"""Checkpoints from which training goes on with the same bits as if it had never stopped.

A checkpoint holds everything that the next step depends on: the trained tensors, the optimiser's moments, the states of
the random generators, the step (the order of the data follows from it), and the best adapter so far.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twofold import atomic
from twofold.errors import RunError
from twofold.tensorfile import TensorFile, write_tensors

STATE, TENSORS = "state.json", "state.safetensors"


@dataclass
class Progressed:
    """How far a training has come.

    Attributes:
        step: optimiser steps done.
        best: the trained tensors at the lowest evaluation loss so far.
        stale: evaluations since then.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def save(
    checkpoints: Path, progressed: Progressed, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> Path:
    """Write a checkpoint folder, whole or not at all."""
    tensors = {f"parameter.{n}": p.detach() for n, p in parameters.items()}
    tensors |= {f"best.{n}": t for n, t in progressed.best.items()}
    for name, parameter in parameters.items():
        tensors |= {f"optimiser.{key}.{name}": value for key, value in optimiser.state[parameter].items()}
    tensors |= _random_states()
    numbers = {k: v for k, v in asdict(progressed).items() if k != "best"}
    folder = folder_of(checkpoints, progressed.step)
    with atomic.new_folder(folder, replace=True) as temporary:
        write_tensors(temporary / TENSORS, tensors)
        atomic.write_json(temporary / STATE, {**numbers, "threads": torch.get_num_threads()})
    return folder


def newest(checkpoints: Path) -> Path | None:
    """The folder of the newest whole checkpoint."""
    found = sorted(p for p in checkpoints.glob("step-*") if (p / STATE).is_file())
    return found[-1] if found else None


def remove_partial(checkpoints: Path) -> None:
    """Remove what a killed process left half-written."""
    for left in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(left)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in sorted(checkpoints.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def load(folder: Path, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> Progressed:
    """Put a checkpoint back into parameters, optimiser and random generators.

    Raises:
        RunError: it belongs to a training of another shape, or to another number of threads, with which the bits differ.
    """
    state = json.loads((folder / STATE).read_text())
    threads = state.pop("threads")
    if threads != torch.get_num_threads():
        raise RunError(
            f"{folder} was written with {threads} threads and this process has {torch.get_num_threads()}, so sums would "
            f"round differently; set OMP_NUM_THREADS={threads} to go on with the same bits"
        )
    file = TensorFile(folder / TENSORS)
    expected = {f"parameter.{n}": tuple(p.shape) for n, p in parameters.items()}
    found = {k: s for k, s in file.shapes.items() if k.startswith("parameter.")}
    if expected != found:
        raise RunError(f"{folder} holds other tensors than this configuration trains; resume with the run's own config")
    for name, parameter in parameters.items():
        parameter.data.copy_(file.read(f"parameter.{name}"))
        optimiser.state[parameter] = _moments(file, name, parameter)
    _restore_random_states(file)
    return Progressed(**state, best={k[5:]: file.read(k) for k in file.shapes if k.startswith("best.")})


def _moments(file: TensorFile, name: str, parameter: nn.Parameter) -> dict[str, Any]:
    keys = ("step", "exp_avg", "exp_avg_sq")
    return {key: file.read(f"optimiser.{key}.{name}").to(parameter.device) for key in keys}


def _random_states() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"random.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random_states(file: TensorFile) -> None:
    torch.set_rng_state(file.read("random.cpu"))
    on_gpus = sorted(k for k in file.shapes if k.startswith("random.cuda."))
    if on_gpus and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([file.read(k) for k in on_gpus])
