"""LoRA over a 16-bit base, over NF4 and over int8: the same data, seed and steps, each in a process of its own.

    python benchmarks/qlora.py [--examples 640] [--held-out 120] [--steps 40] [--batch 16]

Prints a markdown table: held-out loss, the most memory that the process held and what the planner foretold, seconds a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from twofold.data import home_intents

SIDES = {"bf16": None, "NF4": "nf4", "int8": "int8"}
HEAD = ["base", "held-out loss, before", "after", "peak memory, GB", "foretold, GB", "seconds a step"]


def run(folder: Path, quantization: str | None, given: argparse.Namespace) -> tuple[dict[str, Any], list[float]]:
    """A training's report, and the seconds of each of its steps but the first, which prepares kernels."""
    output = folder / (quantization or "none")
    command = [sys.executable, "-m", "twofold", "train", str(folder / "config.yaml"), "--json"]
    command += ["--output", str(output), "--training.max-steps", str(given.steps)]
    command += ["--training.batch-size", str(given.batch)]
    command += [] if quantization is None else ["--quantization", quantization]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    return json.loads(done.stdout), [e["seconds"] for e in events if e["event"] == "step"][1:]


def row(name: str, report: dict[str, Any], seconds: list[float]) -> str:
    """One line of the table."""
    losses = report["evaluation"]
    memory = report["predicted"]["memory"]["total"]["expected"]
    cells = [name, f"{losses['base']['loss']:.3f}", f"{losses['adapter']['loss']:.3f}"]
    cells += [f"{report['peak_memory_bytes'] / 1e9:.2f}", f"{memory / 1e9:.2f}", f"{statistics.median(seconds):.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("examples", 640), ("held-out", 120), ("steps", 40), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        home_intents.write(folder, given.examples, given.held_out)
        settings = {
            "data": {"train": str(folder / "train.jsonl"), "evaluation": str(folder / "evaluation.jsonl")},
            "adapter": {"r": 16},
            "training": {"learning_rate": 1e-3},
            "dtype": "bfloat16",
        }
        (folder / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML too
        print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
        for name, quantization in SIDES.items():
            print(row(name, *run(folder, quantization, given)), flush=True)


if __name__ == "__main__":
    main()
