"""Adapters trained side by side over one base against the same trainings one after the other: time and peak memory.

    python benchmarks/sweep.py                                       8 adapters, batches of 16, 4 and 1 home intents
    python benchmarks/sweep.py --quick                               2 adapters, 2 steps, to see that it runs

Every side is a process of its own, on the same data, in turns. Three sides: passes joined (`joined`), each adapter in passes of its
own over one loaded base (`in turn`), and a process for each adapter, as `twofold train` does, loading included (`apart`). Prints a
table in Markdown, and checks that all sides come to the same held-out losses.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from twofold.config import as_dict, write_yaml
from twofold.data import home_intents
from twofold.data.examples import DataConfig
from twofold.machine import checked_device, peak_memory_bytes
from twofold.recipes.grid import RATE, Cell
from twofold.recipes.loading import load
from twofold.recipes.settings import AdapterSettings, TrainConfig, read_config
from twofold.recipes.side_by_side import SideBySide, run_group
from twofold.recipes.train import resolved
from twofold.training.optim import TrainingConfig
from twofold.world import ALONE

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 4, 1])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1024, help="rows of a joined pass at most")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--apart", action="store_true", help="also a process for each adapter")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(one_side(given.side, given.config, given.adapters, given.rows)))
        return
    if given.quick:
        given.adapters, given.batch_sizes, given.steps = 2, [1], 2
    print("| batch | side | seconds | adapter-steps/s | peak memory, GB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for batch in given.batch_sizes:
            compare(Path(folder), batch, given)


def compare(folder: Path, batch: int, given: argparse.Namespace) -> None:
    """All sides at one batch size."""
    config = resolved(written(folder / str(batch), batch, given))
    file = folder / f"{batch}.yaml"
    file.write_text(write_yaml(config))
    sides = ["joined", "in turn", *(["apart"] if given.apart else [])]
    found = {side: measured(side, file, config, given) for side in sides}
    for side, figures in found.items():
        speed = given.adapters * given.steps / figures["seconds"]
        print(
            f"| {batch} | {side} | {figures['seconds']:.1f} | {speed:.2f} | {figures['peak'] / 1e9:.2f} |", flush=True
        )
    for side, figures in found.items():
        for ours, theirs in zip(figures["losses"], found["in turn"]["losses"], strict=True):
            if abs(ours - theirs) > TOLERANCE[config.dtype] * theirs:
                raise SystemExit(f"{side} came to another held-out loss: {ours} against {theirs}")


def written(folder: Path, batch: int, given: argparse.Namespace) -> TrainConfig:
    """Data of so many steps, and the training."""
    home_intents.write(folder, batch * given.steps, 8)
    data = DataConfig(train=str(folder / "train.jsonl"), evaluation=str(folder / "evaluation.jsonl"))
    training = TrainingConfig(batch_size=batch, checkpoint_every=None, learning_rate=1e-3)
    adapter = AdapterSettings(r=16)
    return TrainConfig(
        data=data, adapter=adapter, training=training, output=str(folder / "run"), dtype=given.dtype, verify=False
    )


def measured(side: str, file: Path, config: TrainConfig, given: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own, or in one for each adapter."""
    if side != "apart":
        common = ["--adapters", str(given.adapters), "--rows", str(given.rows)]
        return run([__file__, "--side", side, "--config", str(file), *common])
    started, reports = time.perf_counter(), []
    for i, cell in enumerate(cells(given.adapters)):
        own = file.with_name(f"{file.stem}-{i}.yaml")
        values = as_dict(cell.of(config)) | {"output": str(file.with_name(f"{file.stem}-apart-{i}"))}
        own.write_text(json.dumps(values))
        reports.append(run(["-m", "twofold", "train", str(own), "--json"]))
    losses = [r["evaluation"]["adapter"]["loss"] for r in reports]
    peak = max(r["peak_memory_bytes"] for r in reports)
    return {"seconds": time.perf_counter() - started, "losses": losses, "peak": peak}


def run(arguments: list[str]) -> dict[str, Any]:
    said = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(said.stdout)
    return found


def cells(count: int) -> list[Cell]:
    """Adapters that differ in their learning rate."""
    return [Cell(((RATE, 1e-3 * (1 + i / 10)),), 0) for i in range(count)]


def one_side(side: str, file: Path, adapters: int, rows: int) -> dict[str, Any]:
    """Seconds of the trainings alone, the base already loaded; and what they came to."""
    config = read_config(file)
    loaded = load(config, lambda event: None, ALONE)
    how = SideBySide(halvings=0, rows_at_once=rows if side == "joined" else 0)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = run_group(config, loaded, cells(adapters), how, Path(folder), lambda event: None)
    seconds = time.perf_counter() - started
    peak = peak_memory_bytes(checked_device(config.device))
    return {"seconds": seconds, "losses": [one["loss"] for one in found], "peak": peak}


if __name__ == "__main__":
    main()
