"""`twofold plan --measure`: real steps of the planned training on synthetic tokens, in a process of their own.

The process is fresh, so that its peak is this training's and nobody else's: `python -m twofold.recipes.measure` reads the
settings as JSON from its standard input and prints what it measured as the last line of its output.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from twofold.adapter.attach import attach
from twofold.base.batch import Example, PackedBatch, pack
from twofold.base.known_shapes import KNOWN_SHAPES
from twofold.base.load import load_base
from twofold.config import build
from twofold.errors import ConfigError, RunError
from twofold.layers.linear import cast_once
from twofold.machine import peak_memory_bytes, synchronise
from twofold.native.training import native_kernels
from twofold.quant import Scheme
from twofold.recipes.plan import HELD_BYTES, PlanSettings
from twofold.recipes.proof import pad_token
from twofold.training.objective import Objective, objective_for
from twofold.training.optim import TrainingConfig, optimiser

STEPS = 3
"""The first prepares kernels and makes the optimiser's moments; the fastest of the others is the time."""


def measure(settings: PlanSettings) -> dict[str, Any]:
    """Peak memory and seconds of a step; `held_bytes` is what the process held before it loaded the base.

    Raises:
        ConfigError: this cannot be run, only planned.
        RunError: the process failed.
    """
    _check_runnable(settings)
    command = [sys.executable, "-m", "twofold.recipes.measure"]
    done = subprocess.run(command, input=json.dumps(asdict(settings)), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}; out of memory?"])[-1]
        raise RunError(f"the measured step failed: {said.split(': ', 1)[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _check_runnable(settings: PlanSettings) -> None:
    reasons = {
        f"of {settings.base} only the shape is here, without weights": settings.base in KNOWN_SHAPES,
        "only adapters are trained here": settings.method == "full",
        "only Twofold's own loop runs here": settings.loop != "twofold",
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ConfigError(f"this training can be planned but not measured: {'; '.join(found)}")


def synthetic_batch(settings: PlanSettings, vocabulary: int) -> PackedBatch:
    """Random tokens, the last of each example supervised."""
    length = settings.sequence_length
    supervised = round(length * settings.supervised_share)
    drawn = torch.randint(vocabulary, (settings.batch_size, length), generator=torch.Generator().manual_seed(0))
    counts = [False] * (length - supervised) + [True] * supervised
    return pack([Example(row, counts) for row in drawn.tolist()])


def measured(settings: PlanSettings) -> dict[str, Any]:
    """Take the steps in this process."""
    device = torch.device(settings.target)
    scheme = None if settings.quantized == "none" else Scheme(settings.quantized)
    base = load_base(settings.base, settings.dtype, settings.target, quantization=scheme)
    torch.manual_seed(0)
    attach(base.model, settings.lora)
    objective = objective_for(base.model, pad_token(base), recompute=settings.gradient_checkpointing)
    optimise = optimiser(base.model, TrainingConfig())
    batch = synthetic_batch(settings, base.model.config.get_text_config().vocab_size)
    base.model.train()
    seconds = []
    for _ in range(STEPS):
        with native_kernels(), cast_once(base.model):
            seconds.append(_step(objective, batch, optimise, device))
    return {
        "held_bytes": HELD_BYTES,
        "peak_bytes": peak_memory_bytes(device),
        "seconds_per_step": min(seconds[1:]),
        "tokens": batch.tokens,
        "path": objective.path,
    }


def _step(objective: Objective, batch: PackedBatch, optimise: torch.optim.Optimizer, device: torch.device) -> float:
    start = time.perf_counter()
    (objective(batch).loss_sum / batch.supervised_tokens).backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimise.param_groups for p in group["params"]], 1.0)
    optimise.step()
    optimise.zero_grad(set_to_none=True)
    synchronise(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(measured(build(PlanSettings, json.load(sys.stdin), source="the settings"))))
