"""`twofold intrinsic`: how few numbers, spread over the whole model by a random map, learn a task (arXiv 2012.13255).

d90 is the smallest d that reaches 90 % of what full fine-tuning reaches: of its score, as the paper has it, and of its gain
over the untouched model, which says more where that is good already.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from twofold import atomic
from twofold.config import as_dict
from twofold.errors import ConfigError, NonFiniteLossError, RunError
from twofold.events import Emit, Message, silent
from twofold.lowrank.subspace import Kind
from twofold.recipes.full import free
from twofold.recipes.loading import Loaded, load
from twofold.recipes.pictures import Series, picture, power_of_ten
from twofold.recipes.runs import RunFolder
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.train import held_out_loss, job_of, resolved
from twofold.training.loop import Job, restore, snapshot
from twofold.training.loop import train as run_job
from twofold.training.subspace import Subspace, layers_in, train_subspace
from twofold.world import ALONE

SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Search:
    """Which subspaces are tried.

    Attributes:
        dimensions: numbers that learn.
        projection: how they are spread: sparse or fastfood.
        layers: learn a factor for each layer too (SAID), which are counted among the dimensions.
        rate_factors: rates of z to try, as multiples of the rate at which a step is as long as one of full fine-tuning, that is
            training.learning_rate · sqrt(values / d); the best counts. Little of a step in a small subspace goes the way of the
            gradient, so that longer ones are wanted.
        seeds: subspaces of each dimension.
    """

    dimensions: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000, 10000)
    projection: Kind = "sparse"
    layers: bool = False
    rate_factors: tuple[float, ...] = (3.0, 10.0, 30.0)
    seeds: int = 1

    def __post_init__(self) -> None:
        if not self.dimensions or min(self.dimensions) < 1 or self.seeds < 1:
            raise ConfigError(
                "intrinsic needs at least one seed and dimensions of at least 1, as in --search.dimensions 100 1000"
            )
        if not self.rate_factors or not all(0 < factor < math.inf for factor in self.rate_factors):
            raise ConfigError("rate_factors must be numbers above 0, as in --search.rate-factors 3 10 30")


def folder_beside(output: Path) -> Path:
    """Where the figures for a run are written."""
    return output.with_name(f"{output.name}-intrinsic")


def intrinsic(config: TrainConfig, search: Search, emit: Emit = silent, *, resume: bool = False) -> dict[str, Any]:
    """Train in subspaces of each dimension and whole, and find d90; returns what intrinsic.json holds.

    Raises:
        UserError: as `train`; or no held-out data, no dimension left beside the factors of layers, or the folder holds another
            search.
    """
    started = time.perf_counter()
    if config.data.evaluation is None:
        raise ConfigError("an intrinsic dimension is judged on held-out data; name some in data.evaluation")
    if config.data.streaming:
        raise ConfigError(
            "every dimension is trained on the same data, which a stream does not give twice; leave out data.streaming"
        )
    config = resolved(replace(config, full=True, adapter=AdapterSettings(), dtype="float32"))
    folder = folder_beside(Path(config.output))
    known = _opened(folder, config, search, resume=resume)
    loaded = load(config, emit, ALONE)
    _check_dimensions(search, loaded)
    free(loaded.base)
    bench = _Bench(config, loaded, job_of(config, RunFolder(folder), loaded, ALONE), folder, known, emit)
    bench.measure("untouched", lambda: _score(loaded))
    bench.measure("full", lambda: _whole(bench))
    for d in search.dimensions:
        for seed in range(search.seeds):
            for factor in search.rate_factors:
                bench.measure(f"{d} | {factor:g} | {seed}", lambda d=d, f=factor, s=seed: _one(bench, search, d, f, s))
    found = _found(search, bench.known) | {"seconds": time.perf_counter() - started, "folder": str(folder)}
    found |= {"base": config.base, "values": sum(p.numel() for p in loaded.base.model.parameters())}
    atomic.write_text(folder / "curve.svg", _drawn(found))
    atomic.write_json(folder / "intrinsic.json", found)
    return found


@dataclass(frozen=True)
class _Bench:
    """What every training begins from, and what is known so far."""

    config: TrainConfig
    loaded: Loaded
    job: Job
    folder: Path
    known: dict[str, Any]
    emit: Emit

    def measure(self, name: str, run: Any) -> None:
        """Run once, and write it down."""
        if name not in self.known:
            self.known[name] = run()
            atomic.write_json(self.folder / "results.json", self.known)
            self.emit(Message(text=f"{name}: {_said(self.known[name])}"))


def _said(found: Mapping[str, Any]) -> str:
    return "not finite" if found["loss"] is None else f"loss {found['loss']:.4f}, score {found['score']:.3f}"


def _opened(folder: Path, config: TrainConfig, search: Search, *, resume: bool) -> dict[str, Any]:
    """What an earlier start of the same search measured."""
    spec, results = folder / "search.json", folder / "results.json"
    own = asdict(search)
    said = json.loads(json.dumps({"config": as_dict(replace(config, output="")), "search": own}))
    if not results.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(spec, said)
        return {}
    if not resume:
        raise RunError(f"{folder} holds a search already; pass --resume to go on with it, or choose another output")
    if json.loads(spec.read_text()) != said:
        raise RunError(f"{folder} holds a search with other settings; choose another output")
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def _factors(search: Search, loaded: Loaded) -> int:
    """How many of the dimensions are factors of layers."""
    return len(layers_in(loaded.base.model)) if search.layers else 0


def _check_dimensions(search: Search, loaded: Loaded) -> None:
    least, factors = min(search.dimensions), _factors(search, loaded)
    if least <= factors:
        raise ConfigError(
            f"{least} dimensions are no more than the model's {factors} layers, whose factors are among them; take more"
        )


def _score(loaded: Loaded) -> dict[str, Any]:
    """The model's held-out loss as it stands, and its accuracy over tokens or examples."""
    loaded.base.model.eval()
    if loaded.evaluation is None:
        raise ConfigError("no held-out data")
    found = held_out_loss(loaded.base, loaded.evaluation)
    finite = math.isfinite(found.loss)
    return {"loss": found.loss if finite else None, "score": found.token_accuracy if finite else 0.0}


def _whole(bench: _Bench) -> dict[str, Any]:
    """Full fine-tuning of the same length."""
    start = snapshot(bench.job.parameters)
    quiet = replace(bench.job.config, checkpoint_every=None, evaluate_every=None, early_stopping=None)
    try:
        run_job(replace(bench.job, config=quiet), silent)
        return _score(bench.loaded)
    except NonFiniteLossError:
        return {"loss": None, "score": 0.0}
    finally:
        restore(bench.job.parameters, start)


def _one(bench: _Bench, search: Search, d: int, factor: float, seed: int) -> dict[str, Any]:
    """One training in one subspace."""
    model, training = bench.loaded.base.model, replace(bench.config.training, seed=bench.config.training.seed + seed)
    own = d - _factors(search, bench.loaded)
    subspace = Subspace(model, own, search.projection, 1000 * (seed + 1), layers=search.layers)
    rate = factor * training.learning_rate * math.sqrt(subspace.total / d)
    model.train()
    try:
        losses = train_subspace(subspace, bench.job.objective, training, bench.job.steps, bench.job.batches, rate=rate)
        found = _score(bench.loaded)
    finally:
        subspace.restore()
        model.eval()
    finite = all(map(math.isfinite, losses))
    return {
        **(found if finite else {"loss": None, "score": 0.0}),
        "rate": rate,
        "train_loss": losses[-1] if finite else None,
    }


def _found(search: Search, known: Mapping[str, Any]) -> dict[str, Any]:
    """The curve at each dimension's best rate, and where it passes 90 %."""
    untouched, full = known["untouched"], known["full"]
    curve = [_point(d, search, known) for d in search.dimensions]
    goals = {"score": SHARE * full["score"], "gain": untouched["score"] + SHARE * (full["score"] - untouched["score"])}
    return {
        "untouched": untouched,
        "full": full,
        "projection": search.projection,
        "layers": search.layers,
        "curve": curve,
        "goals": goals,
        "d90": reached(curve, goals["score"]),
        "d90_of_the_gain": reached(curve, goals["gain"]),
    }


def _point(d: int, search: Search, known: Mapping[str, Any]) -> dict[str, Any]:
    each = [[known[f"{d} | {f:g} | {s}"] for s in range(search.seeds)] for f in search.rate_factors]
    means = [sum(one["score"] for one in runs) / len(runs) for runs in each]
    best = max(range(len(means)), key=means.__getitem__)
    scores = [one["score"] for one in each[best]]
    spread = float(torch.tensor(scores, dtype=torch.float64).std()) if len(scores) > 1 else None
    return {
        "d": d,
        "score": means[best],
        "spread": spread,
        "rate_factor": search.rate_factors[best],
        "loss": each[best][0]["loss"],
    }


def reached(curve: Sequence[Mapping[str, Any]], goal: float) -> int | None:
    """The smallest dimension tried from which on every score is at least the goal; None where the largest falls short."""
    found = None
    for point in sorted(curve, key=lambda p: -p["d"]):
        if point["score"] < goal:
            break
        found = point["d"]
    return found


def _drawn(found: Mapping[str, Any]) -> str:
    points = [(math.log10(p["d"]), p["score"]) for p in found["curve"]]
    ends = (points[0][0], points[-1][0] if len(points) > 1 else points[0][0] + 1)
    level = {"full fine-tuning": found["full"]["score"], "90 % of its score": found["goals"]["score"]}
    level |= {"90 % of its gain": found["goals"]["gain"], "untouched": found["untouched"]["score"]}
    lines = [Series(name, [(x, value) for x in ends]) for name, value in level.items()]
    curve = Series(f"{found['projection']} subspace", points, [p["spread"] for p in found["curve"]])
    return picture("Held-out score by intrinsic dimension", "numbers that learn", [curve, *lines], power_of_ten)
