"""`twofold sweep`: a grid of ranks and learning rates over one loaded base, halved on the way, and what it speaks for."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from twofold import atomic
from twofold.config import as_dict
from twofold.errors import ConfigError, RunError
from twofold.events import Emit, Message, silent
from twofold.machine import checked_device, peak_memory_bytes
from twofold.recipes.grid import RANK, RATE, Cell, Score, cells, recommend, scores
from twofold.recipes.loading import Loaded, load
from twofold.recipes.pictures import Series, picture, power_of_ten
from twofold.recipes.runs import RunFolder
from twofold.recipes.settings import TrainConfig
from twofold.recipes.side_by_side import SideBySide, check_sweepable, forget_checkpoints, run_group
from twofold.recipes.train import held_out_loss, resolved
from twofold.world import ALONE


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A grid.

    Attributes:
        axes: values by setting.
        seeds: how many trainings of each setting.
        how: how trainings share the machine.
        workers: processes on Ray that share the grid; 0 for this process alone.
        ray_address: of a running Ray; a local one is started where none is given.
    """

    axes: dict[str, list[Any]]
    seeds: int = 1
    how: SideBySide = field(default_factory=SideBySide)
    workers: int = 0
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.axes or not all(self.axes.values()):
            raise ConfigError("a sweep needs at least one seed, and one value of --r or --learning-rate")
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}, but must be at least 0, which is this process alone")

    def groups(self, first_seed: int) -> list[list[Cell]]:
        """The cells that are trained side by side: those of a rank, or all where no rates are compared."""
        found: dict[Any, list[Cell]] = {}
        for cell in cells(self.axes, range(first_seed, first_seed + self.seeds)):
            found.setdefault(cell.group if RATE in self.axes else (), []).append(cell)
        return list(found.values())


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep keeps what it makes: sweep.json, groups/, cells/, report.json, losses.svg."""

    path: Path

    def result(self, group: Sequence[Cell]) -> Path:
        """What a group came to, once it has."""
        return self.path / "groups" / f"{group[0].label}.json"

    def report(self) -> Path:
        return self.path / "report.json"

    def begun(self) -> bool:
        """Whether it holds anything of a training."""
        return any((self.path / part).exists() for part in ("groups", "cells"))


def folder_beside(output: Path) -> Path:
    """Where the sweep for a run is written."""
    return output.with_name(f"{output.name}-sweep")


def sweep(config: TrainConfig, asked: Sweep, emit: Emit = silent, *, resume: bool = False) -> dict[str, Any]:
    """Train the grid, and say which setting it speaks for; returns what report.json holds.

    Raises:
        UserError: as `train`; or the folder holds another sweep, or one that is finished.
    """
    started = time.perf_counter()
    config = resolved(config)
    groups = asked.groups(config.training.seed)
    for group in groups:
        for cell in group:
            check_sweepable(cell.of(config))
    place = SweepFolder(folder_beside(Path(config.output)))
    with RunFolder(place.path).locked():
        _open(place, config, asked, resume=resume)
        found = [one for results in _results(config, groups, asked, place, emit) for one in results]
        report = _report(config, asked, found, place, time.perf_counter() - started)
        _draw(place, found)
        atomic.write_json(place.report(), report)
    return report


def _open(place: SweepFolder, config: TrainConfig, asked: Sweep, *, resume: bool) -> None:
    """Raises RunError unless the folder is fresh, or holds this very sweep and is to be resumed."""
    spec = place.path / "sweep.json"
    grid = {"axes": asked.axes, "seeds": asked.seeds, "how": asdict(asked.how)}
    said = json.loads(json.dumps({"config": as_dict(replace(config, output="")), "grid": grid}))
    if not place.begun():
        atomic.write_json(spec, said)
    elif not resume:
        raise RunError(f"{place.path} holds a sweep already; pass --resume to go on with it, or choose another output")
    elif place.report().exists():
        raise RunError(f"the sweep in {place.path} is finished; its report is {place.report()}")
    elif json.loads(spec.read_text()) != said:
        raise RunError(f"{place.path} holds a sweep with other settings; choose another output")


def _results(
    config: TrainConfig, groups: Sequence[Sequence[Cell]], asked: Sweep, place: SweepFolder, emit: Emit
) -> Iterator[list[dict[str, Any]]]:
    """What the groups came to, those of an earlier start read back."""
    missing = [g for g in groups if not place.result(g).is_file()]
    if len(missing) < len(groups):
        emit(Message(text=f"{len(groups) - len(missing)} of {len(groups)} groups of the grid are there already"))
    if asked.workers and missing:
        from twofold.recipes.sweep_ray import run_on_ray

        run_on_ray(config, missing, asked.how, place, asked.workers, asked.ray_address, emit)
    elif missing:
        loaded = load(config, emit, ALONE)
        _note_untouched(loaded, place)
        for i, group in enumerate(missing, 1):
            emit(Message(text=f"group {i} of {len(missing)}: {group[0].label} and {len(group) - 1} more"))
            atomic.write_json(place.result(group), run_group(config, loaded, group, asked.how, place.path, emit))
            forget_checkpoints(group, place.path)
    for group in groups:
        yield json.loads(place.result(group).read_text())


def _note_untouched(loaded: Loaded, place: SweepFolder) -> None:
    """The held-out loss of the bare base, to judge all others by."""
    if loaded.evaluation is not None:
        untouched = held_out_loss(loaded.base, loaded.evaluation)
        atomic.write_json(place.path / "untouched.json", {"loss": untouched.loss, "accuracy": untouched.token_accuracy})


def _report(
    config: TrainConfig, asked: Sweep, found: Sequence[dict[str, Any]], place: SweepFolder, seconds: float
) -> dict[str, Any]:
    ordered = scores(found)
    untouched = place.path / "untouched.json"
    return {
        "sweep": str(place.path),
        "base": config.base,
        "dtype": config.dtype,
        "axes": asked.axes,
        "seeds": asked.seeds,
        "how": asdict(asked.how),
        "untouched": json.loads(untouched.read_text()) if untouched.is_file() else None,
        "cells": list(found),
        "scores": [s.as_json() for s in ordered],
        "recommendation": recommend(ordered),
        "steps": sum(one["steps"] for one in found),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(checked_device(config.device)),
    }


def _draw(place: SweepFolder, found: Sequence[dict[str, Any]]) -> None:
    """Held-out loss against the learning rate, a curve for each rank, and one for what was given up early, as it was then."""
    ordered = [s for s in scores(found) if math.isfinite(s.mean)]
    early = [replace(s, name=f"{s.name}, given up") for s in series_by_rate([s for s in ordered if not s.finished])]
    series = [*series_by_rate([s for s in ordered if s.finished]), *early]
    if any(s.points for s in series):
        drawn = picture("Held-out loss after training", "learning rate", series, power_of_ten)
        atomic.write_text(place.path / "losses.svg", drawn)


def series_by_rate(found: Sequence[Score]) -> Iterator[Series]:
    """A curve over the logarithm of the rate for each setting of everything else."""
    by_group: dict[Any, list[Score]] = {}
    for score in found:
        rest = tuple((k, v) for k, v in score.settings if k != RATE)
        if RATE in dict(score.settings):
            by_group.setdefault(rest, []).append(score)
    for rest, some in sorted(by_group.items(), key=lambda item: str(dict(item[0]).get(RANK, 0)).zfill(6)):
        some.sort(key=lambda s: dict(s.settings)[RATE])
        name = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in rest) or "loss"
        points = [(math.log10(dict(s.settings)[RATE]), s.mean) for s in some]
        yield Series(name, points, [s.spread for s in some])
