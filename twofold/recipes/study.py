"""`twofold study`: the trainings of a study, resumed where they stopped, and what they say, as JSON, pictures and a page.

Adapters are trained side by side over one loaded base, full fine-tuning in a process of its own. Each finished part is
written to results.json at once; a training that is killed goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from twofold import atomic
from twofold.base.load import Base, Precision, load_base
from twofold.config import write_yaml
from twofold.errors import RunError
from twofold.events import Emit, Message, silent
from twofold.machine import checked_device
from twofold.recipes.grid import RATE, Cell, changed
from twofold.recipes.loading import Loaded, load
from twofold.recipes.materials import Ground, ground_of
from twofold.recipes.probes import probe_adapter, probe_full, probe_untouched
from twofold.recipes.settings import TrainConfig
from twofold.recipes.side_by_side import SideBySide, forget_checkpoints, run_group
from twofold.recipes.studies import STUDIES, Arm, Study
from twofold.recipes.study_reading import Found, read
from twofold.recipes.train import held_out_loss, resolved
from twofold.world import ALONE

Row = dict[str, Any]
NOT_FINITE = "so training stopped before it could spoil"
"""What a training says whose loss was not finite."""
HOW = SideBySide(halvings=0, rows_at_once=1024)


def shortened(study: Study) -> Study:
    """The same with a handful of examples, two rates at most and one seed: to see that it runs, and nothing else."""
    arms = tuple(replace(arm, rates=arm.rates[-2:]) for arm in study.arms[:2] + study.arms[-1:])
    unique = tuple({arm.name: arm for arm in arms}.values())
    folder = study.folder and f"{study.folder}-quick"
    few = replace(study, name=f"{study.name}-quick", folder=folder, arms=unique)
    return replace(few, examples=16, held_out=8, seeds=min(2, study.seeds))


def folder_of(study: Study, work: Path) -> Path:
    """Where its trainings are kept."""
    return work / (study.folder or study.name)


@dataclass(frozen=True)
class Unit:
    """Trainings of one arm that run together: some rates, some seeds."""

    arm: Arm
    rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def rows(self) -> list[str]:
        """The names of their results."""
        return [key(self.arm.name, rate, seed) for seed in self.seeds for rate in self.rates]


def key(arm: str, rate: float, seed: int) -> str:
    """The name of one training."""
    return f"{arm} | {rate:g} | {seed}"


class Bench:
    """A study at work: its folder, its base, loaded when first needed, and the results so far."""

    def __init__(self, study: Study, ground: Ground, folder: Path, emit: Emit) -> None:
        self.study, self.ground, self.folder, self.emit = study, ground, folder, emit
        self.results = folder / "results.json"
        self.rows: dict[str, Row] = json.loads(self.results.read_text()) if self.results.is_file() else {}

    @cached_property
    def config(self) -> TrainConfig:
        common = changed(self.ground.config(self.study, self.folder / "run"), self.study.common)
        return resolved(common)

    @cached_property
    def loaded(self) -> Loaded:
        return load(self.config, self.emit, ALONE)

    def base_in(self, dtype: Precision) -> Base:
        """The study's base, or the same in another type."""
        own = self.config
        return self.loaded.base if dtype == own.dtype else load_base(own.base, dtype, own.device, self.emit)

    def keep(self, rows: dict[str, Row]) -> None:
        """Write down what is known."""
        self.rows |= rows
        atomic.write_json(self.results, self.rows)

    def units(self) -> Iterator[Unit]:
        """What is to be trained, in order; the second part of it depends on the results of the first."""
        first, others = seeds_of(self.study)
        for arm in self.study.arms:
            yield Unit(arm, arm.rates, first)
        for arm in self.study.arms:
            if others:
                yield Unit(arm, (best_rate(arm, self.rows),), others)

    def missing(self, unit: Unit) -> bool:
        return any(name not in self.rows for name in unit.rows())

    def alone(self, arm: Arm) -> bool:
        """Whether its trainings are processes of their own."""
        return arm.full or self.study.apart


def seeds_of(study: Study) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those that all rates of an arm run with, and those that only its best rate does."""
    seeds = tuple(range(study.seeds))
    return (seeds, ()) if study.every_rate else (seeds[:1], seeds[1:])


def best_rate(arm: Arm, rows: Mapping[str, Row]) -> float:
    """The rate with the lowest loss of the first seed."""
    losses = {rate: rows[key(arm.name, rate, 0)]["loss"] for rate in arm.rates}
    return min(arm.rates, key=lambda rate: math.inf if losses[rate] is None else losses[rate])


def own_rows(study: Study, rows: Mapping[str, Row]) -> dict[str, Row]:
    """Its trainings among those of a folder, which other studies may share."""
    names = {arm.name for arm in study.arms}
    return {name: row for name, row in rows.items() if row.get("arm") in names}


def still_to_run(study: Study, arm: Arm, rows: Mapping[str, Row]) -> int:
    """How many trainings of an arm are missing."""
    first, others = seeds_of(study)
    missing = [name for name in Unit(arm, arm.rates, first).rows() if name not in rows]
    if missing or not others:
        return len(missing) + len(others)
    return sum(name not in rows for name in Unit(arm, (best_rate(arm, rows),), others).rows())


def seconds_left(study: Study, rows: Mapping[str, Row]) -> float | None:
    """By the mean of its trainings of each kind so far, of adapters and of full models; None before there is one."""
    total = 0.0
    for full in (True, False):
        arms = [arm for arm in study.arms if arm.full is full]
        names = {arm.name for arm in arms}
        spent = [row["spent"] for row in own_rows(study, rows).values() if row["arm"] in names]
        left = sum(still_to_run(study, arm, rows) for arm in arms)
        if left and not spent:
            return None
        total += left * sum(spent) / len(spent) if left else 0.0
    return total


def study(
    asked: Study, work: Path, evidence: Path, emit: Emit = silent, *, ground: Ground | None = None, note: str = ""
) -> dict[str, Any]:
    """Run what is missing of a study, then write NAME.json and its pictures into `evidence`.

    Args:
        work: folder of what trainings leave behind, in which each study has its own.
        ground: base and data in place of the study's own.
        note: what readers should know of this run.

    Raises:
        UserError: as `train`.
        RunError: a training of its own process failed.
    """
    folder = folder_of(asked, work)
    bench = Bench(asked, ground or ground_of(asked, work / "data", emit), folder, emit)
    started = time.perf_counter()
    if "untouched" not in bench.rows:
        bench.keep({"untouched": _untouched(bench)})
    for unit in bench.units():
        if bench.missing(unit):
            left = seconds_left(asked, bench.rows)
            outlook = "" if left is None else f"; about {left / 60:.0f} min of {asked.name} are left"
            emit(Message(text=f"{asked.name}: {unit.arm.name}, {len(unit.rows())} trainings{outlook}"))
            run = _run_apart if bench.alone(unit.arm) else _run_side_by_side
            run(bench, unit)
        if not any(math.isfinite(bench.rows[name]["loss"] or math.nan) for name in unit.rows()):
            raise RunError(f"every training of '{unit.arm.name}' in {asked.name} diverged; give it lower rates")
    found = read(asked, bench.rows, folder)
    report = _report(asked, bench, found) | {"note": note}
    for name, drawn in found.pictures.items():
        atomic.write_text(evidence / name, drawn)
    atomic.write_json(evidence / f"{asked.name}.json", report)
    return {**report, "seconds": time.perf_counter() - started, "evidence": str(evidence)}


def _untouched(bench: Bench) -> Row:
    loaded = bench.loaded
    if loaded.evaluation is None:
        raise RunError("a study needs held-out data")
    found = held_out_loss(loaded.base, loaded.evaluation)
    probes = probe_untouched(bench.study, bench.ground, loaded.base)
    return {"loss": found.loss, "accuracy": found.token_accuracy, "probes": probes}


def _run_side_by_side(bench: Bench, unit: Unit) -> None:
    """Adapters over the loaded base; their probes are made one after the other."""
    settings = tuple(sorted(unit.arm.settings.items()))
    cells = [
        Cell((*settings, (RATE, rate)), seed)
        for seed in unit.seeds
        for rate in unit.rates
        if key(unit.arm.name, rate, seed) not in bench.rows
    ]
    place = bench.folder / "arms" / _plain(unit.arm.name)
    with _spent(place.with_name(f"{place.name}-{'-'.join(map(str, unit.seeds))}")) as spent:
        found = run_group(bench.config, bench.loaded, cells, HOW, place, bench.emit)
    each = spent() / len(cells)
    rows = {}
    for cell, result in zip(cells, found, strict=True):
        path = place / result["adapter"] if result["adapter"] else None
        probes = probe_adapter(bench.study, bench.ground, bench.loaded.base, path) if path else {}
        rate = dict(cell.settings)[RATE]
        kept = {k: result[k] for k in ("loss", "accuracy", "parameters", "steps", "failed_at")}
        own = {"arm": unit.arm.name, "rate": rate, "seed": cell.seed, "spent": each, "alone": False}
        adapter = str(path.relative_to(bench.folder)) if path else None
        rows[key(unit.arm.name, rate, cell.seed)] = {**own, **kept, "adapter": adapter, "probes": probes}
    bench.keep(rows)
    forget_checkpoints(cells, place)


def _run_apart(bench: Bench, unit: Unit) -> None:
    """Trainings in processes of their own, one after the other; of full fine-tuning the model is measured and removed."""
    for seed in unit.seeds:
        for rate in unit.rates:
            name = key(unit.arm.name, rate, seed)
            if name not in bench.rows:
                run = bench.folder / "arms" / _plain(unit.arm.name) / f"rate={rate:g}-seed={seed}"
                with _spent(run) as spent:
                    row = _one_apart(bench, unit.arm, rate, seed, run)
                bench.keep({name: {**row, "spent": spent()}})


def _one_apart(bench: Bench, arm: Arm, rate: float, seed: int, run: Path) -> Row:
    config = changed(bench.config, {**arm.settings, RATE: rate, "training.seed": seed})
    config = replace(config, full=arm.full, output=str(run), dtype=arm.dtype or config.dtype)
    row: Row = {"arm": arm.name, "rate": rate, "seed": seed, "alone": True}
    report = _trained(config, run)
    if report is None:
        return {**row, "loss": None, "accuracy": None, "adapter": None, "probes": {}}
    figures = report["evaluation"]["full" if arm.full else "adapter"]
    made = Path(report["model"] or report["adapter"])
    row |= {
        **{"loss": figures["loss"], "accuracy": figures.get("token_accuracy", figures.get("accuracy"))},
        **{"parameters": report["parameters"]["trainable"], "steps": report["steps"], "failed_at": None},
        "adapter": None if arm.full else str(made.relative_to(bench.folder)),
        "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "file_bytes": sum(f.stat().st_size for f in made.glob("*.safetensors")),
        "verification": report["verification"],
        "base_unchanged": report["base_unchanged"],
        "merged_loss": (report["evaluation"]["merged"] or {}).get("loss"),
        "probes": (probe_full if arm.full else probe_adapter)(
            bench.study, bench.ground, bench.base_in(config.dtype), made
        ),
    }
    if arm.full:
        shutil.rmtree(made)
    return row


@contextmanager
def _spent(place: Path) -> Iterator[Callable[[], float]]:
    """The seconds of some work, those before it was interrupted included, which a file beside its place keeps."""
    file = place.with_name(f"{place.name}.spent.json")
    before = json.loads(file.read_text()) if file.is_file() else 0.0
    started = time.perf_counter()

    def spent() -> float:
        return float(before + time.perf_counter() - started)

    try:
        yield spent
    finally:
        atomic.write_json(file, spent())


def _trained(config: TrainConfig, run: Path) -> dict[str, Any] | None:
    """The report of a training by `twofold train`, of which an earlier start may have made a part, or all; None where it diverged.

    Raises:
        RunError: it failed for another reason than a loss that was not finite.
    """
    report = run / "report.json"
    if not report.is_file():
        file = run.with_name(f"{run.name}.yaml")
        atomic.write_text(file, write_yaml(config))
        command = [sys.executable, "-m", "twofold", "train", str(file), "--resume"]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode and NOT_FINITE in said.stderr:
            return None
        if said.returncode:
            raise RunError(f"{' '.join(command)} failed: {said.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _report(asked: Study, bench: Bench, found: Found) -> dict[str, Any]:
    rows = own_rows(asked, bench.rows)
    device = checked_device(bench.config.device)
    return {
        "study": asked.name,
        "claim": asked.claim,
        "expected": asked.expected,
        "verdict": found.verdict,
        "table": found.table,
        "pictures": sorted(found.pictures),
        "material": asked.material,
        "examples": asked.examples,
        "held_out": asked.held_out,
        "seeds": asked.seeds,
        "dtype": " and ".join(dict.fromkeys(arm.dtype or bench.config.dtype for arm in asked.arms)),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "budget_hours": asked.hours,
        "compute_seconds": sum(row["spent"] for row in rows.values()),
        "trainings": len(rows),
        "rows": {"untouched": bench.rows["untouched"], **rows},
    }


def outlook(names: Sequence[str], work: Path, shape: Callable[[Study], Study]) -> list[dict[str, Any]]:
    """Of each study, how many of its trainings are done and how many seconds the others take, by those so far."""
    found = []
    for name in names:
        asked = shape(STUDIES[name])
        results = folder_of(asked, work) / "results.json"
        rows = json.loads(results.read_text()) if results.is_file() else {}
        done = len(own_rows(asked, rows))
        found.append(
            {
                "study": name,
                "done": done,
                "planned": done + sum(still_to_run(asked, arm, rows) for arm in asked.arms),
                "seconds_left": seconds_left(asked, rows),
                "budget_hours": asked.hours,
            }
        )
    return found
