"""Trainings side by side in one run: Twofold against TRL + PEFT, against a plain loop with PEFT, and against itself.

    python benchmarks/train.py                                       every case in bfloat16
    python benchmarks/train.py --case home-intents --dtype bfloat16 float32 --rounds 3
    python benchmarks/train.py --case lengths --steps 4 --share-prefixes off

Each side is a process of its own (sides.py); they run in turn, never at once, on the same data (cases.py). Their counts of
tokens and of supervised tokens must be equal. Adapters are then judged by one and the same evaluation: PEFT's format is
common ground. Prints Markdown; of several rounds, medians.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import CASES, LENGTHS, TOKENS_PER_STEP, Sizes
from sides import Job

from twofold.base.load import DEFAULT_BASE
from twofold.data.examples import DataConfig
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.evaluate import evaluate

GROUPS = {
    "all": list(CASES),
    "lengths": [f"length-{n}" for n in LENGTHS],
    **{name: [name] for name in CASES},
}
OURS = "Twofold"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=GROUPS, default=["all"])
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--examples", type=int, default=512, help="of home intents and King James")
    parser.add_argument("--held-out", type=int, default=240, help="of the same")
    parser.add_argument("--steps", type=int, default=8, help="of the cases whose lengths are made to measure")
    parser.add_argument("--share-prefixes", choices=["on", "off"], default="on", help="on Twofold's side")
    given = parser.parse_args()
    print(machine(), flush=True)
    for dtype in given.dtype:
        names = dict.fromkeys(name for group in given.case for name in GROUPS[group])
        compared = [name for name in names if CASES[name].peer]
        for name in compared:
            print(comparison(name, dtype, given), flush=True)
        alone = [name for name in names if name not in compared]
        if alone:
            print(by_length(alone, dtype, given), flush=True)


def machine() -> str:
    """What the figures were measured on."""
    packages = (f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "peft", "trl"))
    return f"Machine: {processor()}, {os.cpu_count()} cores; {', '.join(packages)}."


def processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return named.group(1) if named else platform.processor() or platform.machine()


def comparison(name: str, dtype: str, given: argparse.Namespace) -> str:
    """Both sides of a case as a table."""
    sides = [OURS, str(CASES[name].peer)]
    with tempfile.TemporaryDirectory() as folder:
        runs = in_turn(name, sides, dtype, given, Path(folder))
        rows = [figures(runs[side], Path(folder)) for side in sides]
    for key in ("tokens", "supervised tokens"):
        if rows[0][key] != rows[1][key]:
            sys.exit(f"{name}: not the same {key}: {rows[0][key]} and {rows[1][key]}")
    lines = [[key, *(shown(r[key]) for r in rows), shown(ratio(*(r[key] for r in rows)))] for key in rows[0]]
    return f"\n**{name}**, {dtype}\n\n{table(['', *sides, 'ratio'], lines)}"


def by_length(names: list[str], dtype: str, given: argparse.Namespace) -> str:
    """Twofold at several lengths as a table."""
    lines = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            (runs,) = in_turn(name, [OURS], dtype, given, Path(folder)).values()
        found = speeds(runs)
        tokens = TOKENS_PER_STEP // CASES[name].batch
        lines.append([str(tokens), str(CASES[name].batch), *map(shown, found.values())])
    title = f"\n**length of the examples**, {TOKENS_PER_STEP} tokens per step, {dtype}"
    return f"{title}\n\n{table(['tokens', 'examples per step', *found], lines)}"


def in_turn(
    name: str, sides: list[str], dtype: str, given: argparse.Namespace, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """What each side measured, round by round."""
    case, data = CASES[name], folder / "data"
    case.write(data, Sizes(given.examples, given.held_out, given.steps))
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for i in range(given.rounds):
        for side, found in runs.items():
            output = str(folder / f"{len(found)}-{sides.index(side)}")
            job = Job(str(data), output, dtype, case.batch, given.share_prefixes == "on")
            found.append(in_own_process(side, job))
            print(f"  {name}, round {i + 1}, {side}: {json.dumps(found[-1])}", file=sys.stderr)
    return runs


def in_own_process(side: str, job: Job) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("sides.py")), side, json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def figures(runs: list[dict[str, Any]], folder: Path) -> dict[str, float | None]:
    """One side's column."""
    examples = sum(1 for _ in (folder / "data" / "train.jsonl").open(encoding="utf-8"))
    return {
        "examples/s": examples / seconds(runs),
        "tokens": runs[0]["tokens"],
        "supervised tokens": runs[0]["supervised_tokens"],
        **speeds(runs),
        "held-out loss": held_out_loss(runs[0]["adapter"], folder / "data"),
    }


def speeds(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """What the steps took: all of them, and the one in the middle."""
    floors = [r["floor_fraction"] for r in runs if r.get("floor_fraction")]
    return {
        "tokens/s": runs[0]["tokens"] / seconds(runs),
        "seconds per step, median": statistics.median(s for r in runs for s in r["step_seconds"]),
        "of it in matrix products": statistics.median(floors) if floors else None,
        "peak memory, GB": max(r["peak_memory_bytes"] for r in runs) / 1e9,
    }


def seconds(runs: list[dict[str, Any]]) -> float:
    """Of all steps; the median of the rounds."""
    return statistics.median(sum(r["step_seconds"]) for r in runs)


def held_out_loss(adapter: str, data: Path) -> float:
    """The one judge of both adapters: float32, on the held-out examples."""
    base = load_with_adapters(DEFAULT_BASE, [adapter], "float32")
    return float(evaluate(base, DataConfig(train=str(data / "evaluation.jsonl")))["loss"])


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *map(list, lines)])


if __name__ == "__main__":
    main()
