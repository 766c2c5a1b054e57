"""A grid on Ray: workers that each hold the base once and take groups of trainings in turn, here or on other machines.

A group's cells are halved against each other, so a group stays in one worker. What it made comes back as values, adapters'
files as bytes, so that workers and this process need no folder in common; every machine must know the base and the data by the
same names.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from twofold import atomic
from twofold.errors import ConfigError
from twofold.events import Emit, Message, silent
from twofold.recipes.grid import Cell
from twofold.recipes.loading import load
from twofold.recipes.settings import TrainConfig
from twofold.recipes.side_by_side import SideBySide, run_group
from twofold.recipes.train import held_out_loss
from twofold.world import ALONE


class Worker:
    """One process with the base and the data; it trains what it is given."""

    def __init__(self, config: TrainConfig, how: SideBySide, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config, self.how = config, how
        self.loaded = load(config, silent, ALONE)

    def untouched(self) -> dict[str, float]:
        """The held-out loss of the bare base."""
        if self.loaded.evaluation is None:
            raise ConfigError("a grid is judged on held-out data; name some in data.evaluation")
        found = held_out_loss(self.loaded.base, self.loaded.evaluation)
        return {"loss": found.loss, "accuracy": found.token_accuracy}

    def run(self, group: Sequence[Cell]) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        """What a group came to, and the files of its adapters by their paths in the sweep's folder."""
        with tempfile.TemporaryDirectory() as folder:
            found = run_group(self.config, self.loaded, group, self.how, Path(folder), silent)
            kept = [Path(folder) / one["adapter"] for one in found if one["adapter"]]
            files = [f for adapter in kept for f in sorted(adapter.iterdir())]
            return found, {str(f.relative_to(folder)): f.read_bytes() for f in files}


def run_on_ray(
    config: TrainConfig,
    groups: Sequence[Sequence[Cell]],
    how: SideBySide,
    place: Any,
    workers: int,
    address: str | None,
    emit: Emit,
) -> None:
    """Have Ray train the groups, and write down each as it comes back.

    Args:
        place: the sweep's folder.
        address: of a running Ray; None starts one on this machine.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("a sweep on Ray needs it: pip install 'twofold[ray]'") from error
    from ray.util import ActorPool

    workers = min(workers, len(groups))
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, num_cpus=None if address else workers, include_dashboard=False, log_to_driver=False)
    try:
        threads = max(1, (os.cpu_count() or 1) // workers) if address is None else torch.get_num_threads()
        actors = [ray.remote(num_cpus=1)(Worker).remote(config, how, threads) for _ in range(workers)]
        emit(Message(text=f"{len(groups)} groups over {workers} workers of Ray"))
        atomic.write_json(place.path / "untouched.json", ray.get(actors[0].untouched.remote()))
        done = ActorPool(actors).map_unordered(lambda actor, group: actor.run.remote(group), list(groups))
        for found, files in done:
            _write(place, found, files)
            emit(Message(text=f"{found[0]['label']} and {len(found) - 1} more are done"))
    finally:
        if started:
            ray.shutdown()


def _write(place: Any, found: list[dict[str, Any]], files: dict[str, bytes]) -> None:
    """The adapters first: where the result stands, the group is done."""
    for adapter in sorted({str(Path(name).parent) for name in files}):
        with atomic.new_folder(place.path / adapter, replace=True) as folder:
            for name, content in files.items():
                if str(Path(name).parent) == adapter:
                    (folder / Path(name).name).write_bytes(content)
    atomic.write_json(place.path / "groups" / f"{found[0]['label']}.json", found)
