"""Checkpoints from which training goes on with the same bits as if it had never stopped.

A checkpoint holds everything that the next step depends on: the trained tensors, what the adapter holds beside them (a frozen A,
the start that an update is counted from), the optimiser's moments, the best adapter so far, and the step, from which the order of
the data and the draws of dropout follow. All processes of a training hold the
same, so one of them writes and reads for all, and a training goes on with another number of them: then sums are taken in
another order, and losses agree to rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

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
        left_out: examples of all processes, so far, in which nothing could be learned.
        failed: the step whose loss or gradient was not finite, where a training was left alone after it.
        closing: the losses of its last steps, where it is one of several side by side.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    left_out: int = 0
    failed: int | None = None
    closing: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """The tensors that make a training what it is, by name.

    Attributes:
        parameters: what learns.
        constants: what the adapter holds beside them, drawn or computed at its start.
    """

    parameters: Mapping[str, nn.Parameter]
    constants: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by their names in a checkpoint."""
        return {f"parameter.{n}": p for n, p in self.parameters.items()} | {
            f"constant.{n}": t for n, t in self.constants.items()
        }


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def save(
    checkpoints: Path,
    progressed: Progressed,
    trained: Trained,
    optimiser: torch.optim.Optimizer,
    processes: int = 1,
) -> Path:
    """Write a checkpoint folder, whole or not at all."""
    tensors = {name: t.detach() for name, t in trained.tensors().items()}
    tensors |= {f"best.{n}": t for n, t in progressed.best.items()}
    for name, parameter in trained.parameters.items():
        tensors |= {f"optimiser.{key}.{name}": value for key, value in optimiser.state[parameter].items()}
    numbers = {k: v for k, v in asdict(progressed).items() if k != "best"}
    folder = folder_of(checkpoints, progressed.step)
    with atomic.new_folder(folder, replace=True) as temporary:
        write_tensors(temporary / TENSORS, tensors)
        atomic.write_json(temporary / STATE, {**numbers, "threads": torch.get_num_threads(), "processes": processes})
    return folder


def newest(checkpoints: Path) -> Path | None:
    """The folder of the newest whole checkpoint."""
    return max((p for p in checkpoints.glob("step-*") if (p / STATE).is_file()), key=step_of, default=None)


def remove_partial(checkpoints: Path) -> None:
    """Remove what a killed process left half-written."""
    for left in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(left)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in sorted(checkpoints.glob("step-*"), key=step_of)[:-keep]:
        shutil.rmtree(old)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds, on the CPU: tensors as `Trained` names them, and the optimiser's state of each parameter.

    Attributes:
        processes: how many trained when it was written.
    """

    progressed: Progressed
    tensors: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    processes: int


def read(folder: Path, trained: Trained, processes: int = 1) -> Saved:
    """Read a checkpoint for a training of these tensors in so many processes.

    Raises:
        RunError: it belongs to a training of another shape, or to another number of threads, with which the bits differ.
    """
    state = json.loads((folder / STATE).read_text())
    threads, before = state.pop("threads"), state.pop("processes", 1)
    if threads != torch.get_num_threads() and before == processes:
        raise RunError(
            f"{folder} was written with {threads} threads and this process has {torch.get_num_threads()}, so sums would "
            f"round differently; set OMP_NUM_THREADS={threads} to go on with the same bits"
        )
    file = TensorFile(folder / TENSORS)
    expected = {name: tuple(t.shape) for name, t in trained.tensors().items()}
    found = {k: s for k, s in file.shapes.items() if k.startswith(("parameter.", "constant."))}
    if expected != found:
        raise RunError(f"{folder} holds other tensors than this configuration trains; resume with the run's own config")
    return Saved(
        Progressed(**state, best={k[5:]: file.read(k) for k in file.shapes if k.startswith("best.")}),
        {name: file.read(name) for name in expected},
        {n: _moments(file, n) for n in trained.parameters},
        before,
    )


def restore(saved: Saved, trained: Trained, optimiser: torch.optim.Optimizer) -> None:
    """Put a checkpoint back into what is trained, and into the optimiser."""
    for name, tensor in trained.tensors().items():
        tensor.data.copy_(saved.tensors[name])
    for name, parameter in trained.parameters.items():
        optimiser.state[parameter] = {k: v.to(parameter.device) for k, v in saved.moments[name].items()}


def _moments(file: TensorFile, name: str) -> dict[str, Tensor]:
    """AdamW's state of one parameter; empty while no gradient has reached it."""
    keys = {key: f"optimiser.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq", "master")}
    return {key: file.read(stored) for key, stored in keys.items() if stored in file.shapes}
