"""`sweep`: every adapter is the one that `train` makes alone; halving, resuming, and what the losses speak for."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from tiny_runs import Heard, adapter_tensors, changed
from warm_cli import WarmCli

from twofold.config import as_dict
from twofold.errors import BaseError, ConfigError, RunError
from twofold.events import Message
from twofold.recipes import side_by_side
from twofold.recipes.grid import RANK, RATE, Cell, noise, ranks, rates, recommend, scores
from twofold.recipes.settings import TrainConfig
from twofold.recipes.side_by_side import SideBySide
from twofold.recipes.sweep import Sweep, sweep
from twofold.recipes.train import train
from twofold.training import together

pytest_plugins = ("tiny_fixtures",)

IN_TURN, JOINED = SideBySide(halvings=0, rows_at_once=0), SideBySide(halvings=0, rows_at_once=4096)
AXES = {RANK: [2, 6], RATE: [0.003, 0.02]}


@pytest.fixture
def grid(config: TrainConfig) -> TrainConfig:
    return changed(config, epochs=2)


def alone(config: TrainConfig, cell: dict[str, Any], folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The same training by `train`."""
    own = Cell(tuple(cell["settings"].items()), cell["seed"]).of(config)
    report = train(replace(own, output=str(folder / cell["label"]), verify=False))
    return adapter_tensors(report["adapter"]), report["evaluation"]["adapter"]["loss"]


def test_in_turn_every_adapter_has_the_bits_of_its_own_training(grid: TrainConfig, tmp_path: Path) -> None:
    grid = replace(grid, adapter=replace(grid.adapter, lora_dropout=0.1))
    found = sweep(grid, Sweep(axes=AXES, seeds=2, how=IN_TURN))
    assert len(found["cells"]) == 8
    for cell in found["cells"][::3]:
        tensors, loss = alone(grid, cell, tmp_path)
        ours = adapter_tensors(Path(found["sweep"]) / cell["adapter"])
        assert ours.keys() == tensors.keys()
        assert all(torch.equal(ours[k], tensors[k]) for k in ours), cell
        assert cell["loss"] == loss


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_on_joined_rows_every_adapter_is_its_own_to_rounding(
    grid: TrainConfig, tmp_path: Path, micro_batch_size: int | None
) -> None:
    grid = changed(grid, micro_batch_size=micro_batch_size, loraplus_lr_ratio=4.0, weight_decay=0.1)
    found = sweep(grid, Sweep(axes=AXES, how=JOINED))
    for cell in found["cells"][::3]:
        tensors, loss = alone(grid, cell, tmp_path)
        ours = adapter_tensors(Path(found["sweep"]) / cell["adapter"])
        assert cell["loss"] == pytest.approx(loss, rel=1e-5)
        for name, tensor in tensors.items():
            assert torch.allclose(ours[name], tensor, atol=2e-4), (cell["label"], name)


def test_bases_without_a_fast_path_are_swept_in_turn(grid: TrainConfig, gpt2_base: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"the {c} is", "completion": f" {c[::-1]}"} for c in ("cup", "hat", "boat", "lamp", "door", "coat")
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = replace(grid, base=str(gpt2_base), data=replace(grid.data, train=str(data), evaluation=str(data)))
    found = sweep(own, Sweep(axes={RANK: [2, 4]}, how=JOINED))
    assert found["cells"][1]["loss"] == alone(own, found["cells"][1], tmp_path)[1]


def test_hopeless_rates_are_given_up_and_the_others_are_not_disturbed(grid: TrainConfig, tmp_path: Path) -> None:
    axes = {RANK: [2, 4], RATE: [1e-6, 1e-5, 0.01, 0.02]}
    heard = Heard()
    found = sweep(grid, Sweep(axes=axes, how=SideBySide(halvings=2, rows_at_once=0)), heard)
    finished = [c for c in found["cells"] if c["finished"]]
    assert [c["settings"][RANK] for c in finished] == [2, 4]
    assert all(c["settings"][RATE] >= 0.01 for c in finished)
    stopped = [c for c in found["cells"] if not c["finished"]]
    assert {c["steps"] for c in stopped} == {2, 4}
    assert all(c["adapter"] is None for c in stopped)
    assert any("given up" in m.text for m in heard.of(Message))
    for cell in finished:
        assert cell["loss"] == alone(grid, cell, tmp_path)[1]
    assert found["steps"] == sum(c["steps"] for c in found["cells"]) < 8 * 8
    picture = (Path(found["sweep"]) / "losses.svg").read_text()
    ElementTree.fromstring(picture)
    assert "r 2" in picture
    assert found["untouched"]["loss"] > max(c["loss"] for c in finished)


def test_a_rate_that_breaks_its_adapter_leaves_the_others_alone(grid: TrainConfig) -> None:
    found = sweep(grid, Sweep(axes={RATE: [0.01, 1e38]}, how=JOINED))
    good, broken = found["cells"]
    assert broken["failed_at"] is not None
    assert broken["loss"] is None
    assert math.isfinite(good["loss"])
    assert found["recommendation"]["settings"] == {RATE: 0.01}


@pytest.fixture
def breaks_at_the_sixth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training at a rate of 0.02 has then a loss that is not finite."""
    real = together._update

    def update(one: together.Learner, loss: float, batches: Any) -> None:
        broken = one.job.config.learning_rate == 0.02 and one.progressed.step == 5
        real(one, math.nan if broken else loss, batches)

    monkeypatch.setattr(together, "_update", update)


@pytest.mark.usefixtures("breaks_at_the_sixth_step")
def test_a_training_that_breaks_late_is_not_judged_by_what_it_was_before(grid: TrainConfig) -> None:
    found = sweep(grid, Sweep(axes={RATE: [1e-6, 0.02]}, how=SideBySide(halvings=2)))
    assert [(c["failed_at"], c["loss"], c["finished"]) for c in found["cells"]][1] == (6, None, True)
    assert found["recommendation"]["settings"] is None


@pytest.mark.usefixtures("breaks_at_the_sixth_step")
def test_a_training_that_broke_is_left_alone_after_an_interruption_too(
    grid: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Sweep(axes={RATE: [0.005, 0.02]}, how=IN_TURN)
    whole = sweep(replace(grid, output=str(tmp_path / "whole")), asked)
    real, calls = together.advance, []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(side_by_side, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(grid, asked)
    again = sweep(grid, asked, resume=True)
    for ours, theirs in zip(again["cells"], whole["cells"], strict=True):
        assert {k: ours[k] for k in ("loss", "steps", "failed_at")} == {
            k: theirs[k] for k in ("loss", "steps", "failed_at")
        }
    assert again["cells"][1]["failed_at"] == 6


def test_killed_and_resumed_it_comes_to_the_same(cli: WarmCli, grid: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(as_dict(grid)))
    kill = (
        "import os, signal, twofold.training.together as t\nreal, calls = t._step, [0]\n"
        "def step(*a):\n    calls[0] += 1\n    if calls[0] == 14: os.kill(os.getpid(), signal.SIGKILL)\n    real(*a)\n"
        "t._step = step\n"
    )
    flags = ("--r", "2,4", "--learning-rate", "0.001,0.005,0.02", "--how.rows-at-once", 0)
    whole = cli("sweep", path, *flags, "--json").json()
    (tmp_path / "run-sweep").rename(tmp_path / "kept")
    assert cli("sweep", path, *flags, setup=kill).code == -signal.SIGKILL
    assert "pass --resume" in cli("sweep", path, *flags).refusal()
    again = cli("sweep", path, *flags, "--resume", "--json").json()
    assert again["cells"] == whole["cells"]
    assert again["recommendation"] == whole["recommendation"]
    assert "is finished" in cli("sweep", path, *flags, "--resume").refusal()


def test_another_grid_cannot_go_on_in_its_folder(grid: TrainConfig) -> None:
    sweep(grid, Sweep(axes={RANK: [2]}, how=IN_TURN))
    (Path(f"{grid.output}-sweep") / "report.json").unlink()
    with pytest.raises(RunError, match="other settings"):
        sweep(grid, Sweep(axes={RANK: [3]}, how=IN_TURN), resume=True)


def test_a_sweep_that_failed_before_it_trained_leaves_nothing_in_the_way(grid: TrainConfig) -> None:
    asked = Sweep(axes={RANK: [2]}, how=IN_TURN)
    with pytest.raises(BaseError, match="no base at"):
        sweep(replace(grid, base="no-such-base"), asked)
    assert sweep(changed(grid, max_steps=1), asked)["steps"] == 1


def test_what_cannot_be_swept_is_named(grid: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.evaluation \(none\) and training\.compile"):
        sweep(changed(replace(grid, data=replace(grid.data, evaluation=None)), compile=True), Sweep(axes={RANK: [2]}))
    with pytest.raises(ConfigError, match=r"with training\.evaluate_every"):
        sweep(changed(grid, evaluate_every=2), Sweep(axes={RANK: [2]}))
    with pytest.raises(ConfigError, match="at least one seed"):
        Sweep(axes={})
    with pytest.raises(ConfigError, match="workers is -1"):
        Sweep(axes={RANK: [2]}, workers=-1)


@pytest.mark.slow
def test_two_workers_of_ray_give_the_same_grid(grid: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = sweep(grid, Sweep(axes=AXES, how=IN_TURN))
    there = sweep(replace(grid, output=str(tmp_path / "ray")), Sweep(axes=AXES, how=IN_TURN, workers=2))
    assert there["recommendation"]["settings"] == here["recommendation"]["settings"]
    for ours, theirs in zip(there["cells"], here["cells"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        one, other = (adapter_tensors(Path(f["sweep"]) / c["adapter"]) for f, c in ((there, ours), (here, theirs)))
        assert all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)


# ---------------------------------------------------------------------------------------------- axes and advice


def test_axes_as_people_write_them() -> None:
    assert ranks("64,4,16") == [4, 16, 64]
    assert rates("1e-4..1e-2") == [1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2]
    assert rates("1e-4..3e-3:3") == [1e-4, 5.5e-4, 3e-3]
    assert rates("2e-4") == [2e-4]
    for wrong in ("", "a", "1e-3..1e-4", "0..1", "-1"):
        with pytest.raises(ConfigError, match="learning rates"):
            rates(wrong)
    with pytest.raises(ConfigError, match="ranks"):
        ranks("4,x")


def test_rates_that_agree_in_six_digits_have_folders_of_their_own() -> None:
    labels = [Cell(((RATE, rate),), 0).label for rate in (0.02, 0.02000001, 0.02000002)]
    assert labels[0] == "learning_rate=0.02-seed=0"
    assert len(set(labels)) == 3


def result(r: int, rate: float, seed: int, loss: float | None, finished: bool = True) -> dict[str, Any]:
    return {"settings": {RANK: r, RATE: rate}, "seed": seed, "loss": loss, "finished": finished}


def test_the_smallest_rank_that_cannot_be_told_from_the_best_is_recommended() -> None:
    """Spreads of 0.01 and three seeds: two standard errors of a difference are 0.0163."""
    losses = {(4, 1e-3): 0.51, (16, 1e-3): 0.50, (16, 3e-3): 0.515, (64, 1e-3): 0.505, (2, 1e-3): 0.53}
    found = scores([result(r, rate, s, mean + (s - 1) * 0.01) for (r, rate), mean in losses.items() for s in range(3)])
    assert noise(found) == pytest.approx(0.01 * math.sqrt(2 / 3))
    advice = recommend(found)
    assert advice["best"]["settings"] == {RANK: 16, RATE: 1e-3}
    assert advice["settings"] == {RANK: 4, RATE: 1e-3}
    assert advice["rates"] == [1e-3]
    assert {RANK: 2, RATE: 1e-3} not in advice["level_with_the_best"]
    assert {RANK: 16, RATE: 3e-3} in advice["level_with_the_best"]


def test_a_rate_at_which_seeds_diverge_is_no_measure_of_noise() -> None:
    losses = {
        (4, 1e-3): (1.10, 1.11, 1.12),
        (4, 3e-3): (0.80, 0.81, 0.82),
        (64, 3e-3): (0.78, 0.79, 0.80),
        (64, 3e-2): (0.80, 1.20, 4.00),
    }
    advice = recommend(
        scores([result(r, rate, s, loss) for (r, rate), each in losses.items() for s, loss in enumerate(each)])
    )
    assert advice["standard_error_of_a_difference"] == pytest.approx(0.01 * math.sqrt(2 / 3))
    assert advice["level_with_the_best"] == [{RANK: 64, RATE: 3e-3}]


def test_with_one_seed_one_per_cent_is_noise_and_what_stopped_or_broke_does_not_count() -> None:
    found = scores(
        [result(8, 1e-3, 0, 0.5), result(4, 1e-3, 0, 0.504), result(2, 1e-3, 0, 0.4, False), result(1, 1.0, 0, None)]
    )
    assert noise(found) is None
    assert recommend(found)["settings"] == {RANK: 4, RATE: 1e-3}
    assert recommend(scores([result(1, 1.0, 0, None)]))["settings"] is None
