"""A run killed at any moment and resumed gives the same bytes as one that was never killed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import KILL_AT_STEP
from warm_cli import Finished, WarmCli, cold

from twofold.recipes.runs import RunFolder
from twofold.training import checkpoint

pytest_plugins = ("tiny_fixtures",)

FILES = ("adapter_model.safetensors", "adapter_config.json", "twofold.json")
STEPS, STEPS_PER_EPOCH = 24, 4

KILL_IN_WRITE = """
import os, signal, pathlib, twofold.tensorfile as tensorfile
real, calls = tensorfile.save_file, [0]
def save(tensors, path, metadata):
    calls[0] += {file!r} in str(path)
    real(tensors, path, metadata)
    if calls[0] == {call} and {file!r} in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
tensorfile.save_file = save
"""
KILL_BEFORE_RENAME = """
import os, signal, twofold.atomic as atomic
real = atomic.os.replace
def replace(source, target):
    if str(target).endswith({target!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
atomic.os.replace = replace
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, llama_base: Path, train_file: Path, held_out_file: Path) -> Path:
    """Everything whose state a resumed run must get back: dropout, accumulation, epochs, evaluations, moments."""
    path = tmp_path_factory.mktemp("resume") / "config.yaml"
    training = {"batch_size": 6, "micro_batch_size": 2, "epochs": STEPS // STEPS_PER_EPOCH, "learning_rate": 0.01}
    settings = {
        "base": str(llama_base),
        "data": {"train": str(train_file), "evaluation": str(held_out_file)},
        "adapter": {"r": 4, "lora_dropout": 0.1},
        "training": training | {"checkpoint_every": 3, "evaluate_every": 5, "schedule": "linear"},
        "dtype": "float32",
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def reference(config: Path) -> Path:
    """The run that nobody disturbed, by `python -m twofold`."""
    run = config.parent / "reference"
    assert cold("train", config, "--output", run).code == 0
    return run


def adapter_bytes(run: Path) -> dict[str, bytes]:
    return {name: (run / "adapter" / name).read_bytes() for name in FILES}


def recorded(run: Path, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [e for e in events if e["event"] == kind]


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(e["step"], e["loss"], e["gradient_norm"]) for e in recorded(run, "step")]


def whole_checkpoints(run: Path) -> list[int]:
    """Steps of what looks like a checkpoint; each must open."""
    from twofold.tensorfile import TensorFile

    found = sorted((run / "checkpoints").glob("step-*"))
    for folder in found:
        assert TensorFile(folder / "state.safetensors").shapes
        assert json.loads((folder / "state.json").read_text())["step"] == int(folder.name.removeprefix("step-"))
    return [int(f.name.removeprefix("step-")) for f in found]


def assert_same(run: Path, reference: Path) -> None:
    assert adapter_bytes(run) == adapter_bytes(reference)
    assert losses(run) == losses(reference)
    held_out = [[(e["step"], e["loss"], e["best"]) for e in recorded(r, "evaluated")] for r in (run, reference)]
    assert held_out[0] == held_out[1]
    ours, theirs = (json.loads((r / "report.json").read_text()) for r in (run, reference))
    for key in ("steps", "best_step", "tokens", "supervised_tokens", "evaluation", "base_unchanged"):
        assert ours[key] == theirs[key], key


def killed(cli: WarmCli, config: Path, run: Path, setup: str, *more: str) -> None:
    found = cli("train", config, "--output", run, *more, setup=setup)
    assert found.code == -signal.SIGKILL, found


def resumed(cli: WarmCli, config: Path, run: Path) -> Finished:
    found = cli("train", config, "--output", run, "--resume")
    assert found.code == 0, found.stderr
    return found


def test_the_reference_is_a_run_worth_comparing(reference: Path) -> None:
    """Several epochs, evaluations, checkpoints; and dropout that draws anew at each step."""
    assert [s for s, _, _ in losses(reference)] == list(range(1, STEPS + 1))
    assert [e["step"] for e in recorded(reference, "checkpointed")] == list(range(3, STEPS + 1, 3))
    assert len(recorded(reference, "evaluated")) == STEPS // 5 + 1  # and once more at the last step
    assert whole_checkpoints(reference) == [21, 24]


def test_the_same_training_elsewhere_gives_the_same_bytes(
    cli: WarmCli, config: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "deeper" / "elsewhere"
    assert cli("train", config, "--output", run).code == 0
    assert_same(run, reference)
    for name in ("adapter_config.json", "twofold.json"):
        text = (run / "adapter" / name).read_text()
        values = [v for v in walk(json.loads(text)) if isinstance(v, str)]
        assert not [v for v in values if v.startswith("/") or str(config.parent) in v or os.sep + "tmp" in v]
        assert not re.search(r"20\d\d-\d\d|\d\d:\d\d:\d\d", text)
        assert not [v for v in walk(json.loads(text)) if isinstance(v, float) and abs(v) > 1e6]


def walk(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inner is None else [leaf for v in inner for leaf in walk(v)]


def test_another_seed_gives_other_bytes(cli: WarmCli, config: Path, reference: Path, tmp_path: Path) -> None:
    """Or equal bytes would say nothing."""
    run = tmp_path / "run"
    assert cli("train", config, "--output", run, "--training.seed", 1, "--training.epochs", 1).code == 0
    assert losses(run)[0] != losses(reference)[0]


@pytest.mark.parametrize("step", [2, 9, 15, 23], ids=["before-any-checkpoint", "mid-epoch", "just-saved", "last-step"])
def test_killed_between_steps(cli: WarmCli, config: Path, reference: Path, tmp_path: Path, step: int) -> None:
    run = tmp_path / "run"
    killed(cli, config, run, KILL_AT_STEP.format(step=step))
    assert [s for s, _, _ in losses(run)] == list(range(1, step + 1))
    assert max(whole_checkpoints(run), default=0) == step // 3 * 3
    assert not (run / "adapter").exists()
    assert not (run / "report.json").exists()
    resumed(cli, config, run)
    assert_same(run, reference)


def test_killed_in_the_middle_of_writing_a_checkpoint(
    cli: WarmCli, config: Path, reference: Path, tmp_path: Path
) -> None:
    """Twice: half a file of tensors at the fourth checkpoint, then a whole one that was never renamed at the fifth."""
    run = tmp_path / "run"
    killed(cli, config, run, KILL_IN_WRITE.format(file="state.safetensors", call=4))
    assert whole_checkpoints(run) == [6, 9]
    assert list((run / "checkpoints").glob(".step-000012*")), "the kill came too early to prove anything"
    killed(cli, config, run, KILL_BEFORE_RENAME.format(target="step-000015"), "--resume")
    assert whole_checkpoints(run) == [9, 12]
    resumed(cli, config, run)
    assert_same(run, reference)


def test_killed_in_the_middle_of_writing_the_adapter_or_the_report(
    cli: WarmCli, config: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed(cli, config, run, KILL_IN_WRITE.format(file="adapter_model", call=1))
    assert not (run / "adapter").exists()
    killed(cli, config, run, KILL_BEFORE_RENAME.format(target="report.json"), "--resume")
    assert adapter_bytes(run) == adapter_bytes(reference)
    resumed(cli, config, run)
    assert_same(run, reference)


def test_killed_again_and_again_at_random_moments(cli: WarmCli, config: Path, reference: Path, tmp_path: Path) -> None:
    run, rng, kills, longest = tmp_path / "run", random.Random(5), 0, 0.4
    while not (run / "report.json").exists():
        pid = cli.start("train", config, "--output", run, "--resume")
        time.sleep(rng.uniform(0.1, longest))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        kills += cli.wait().code == -signal.SIGKILL
        longest *= 1.3
        whole_checkpoints(run)
    assert (run / "report.html").exists()
    assert kills >= 2
    assert_same(run, reference)


def test_a_last_line_of_events_that_a_crash_cut_short_is_forgotten(
    cli: WarmCli, config: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed(cli, config, run, KILL_AT_STEP.format(step=10))
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 11, "nested": {"cut": 1}')
    resumed(cli, config, run)
    assert_same(run, reference)


def test_a_damaged_line_of_events_is_passed_over(tmp_path: Path) -> None:
    """As a power loss leaves it: whole lines on both sides."""
    whole = b'{"event": "step", "step": 1}\n', b'{"event": "step", "step": 2}\n'
    for damaged in (b"\0\0\0\0", b"\xff\r\xfe", b'{"event": "st', b"7", b""):
        (tmp_path / "events.jsonl").write_bytes(whole[0] + damaged + b"\n" + whole[1])
        assert [event["step"] for event in RunFolder(tmp_path).recorded()] == [1, 2]


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def stopped(cli: WarmCli, config: Path) -> Path:
    """A run that was killed at step 8, after the checkpoint at 6."""
    run = config.parent / "stopped"
    killed(cli, config, run, KILL_AT_STEP.format(step=8))
    return run


def files(folder: Path) -> dict[str, bytes]:
    """All but the lock, which says nothing once its process is gone."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--training.learning-rate", "0.02"), "training"),
        (("--adapter.r", "8"), "adapter"),
        (("--dtype", "bfloat16"), "dtype"),
        (("--data.max-length", "20"), "data"),
    ],
)
def test_other_settings_cannot_resume_a_run(
    cli: WarmCli, config: Path, stopped: Path, flags: tuple[str, ...], named: str
) -> None:
    before = files(stopped)
    said = cli("train", config, "--output", stopped, "--resume", *flags).refusal()
    assert f"was started with other settings ({named})" in said
    assert files(stopped) == before


def test_a_run_is_not_started_over(cli: WarmCli, config: Path, stopped: Path) -> None:
    before = files(stopped)
    said = cli("train", config, "--output", stopped).refusal()
    assert "holds a run already; pass --resume" in said
    assert files(stopped) == before


def test_a_finished_run_is_not_resumed(cli: WarmCli, config: Path, reference: Path) -> None:
    before = files(reference)
    said = cli("train", config, "--output", reference, "--resume").refusal()
    assert "is finished; its adapter is in" in said
    assert files(reference) == before


def test_a_run_that_is_going_on_is_left_alone(cli: WarmCli, config: Path, stopped: Path, tmp_path: Path) -> None:
    """Its events after the newest checkpoint are news, and what looks half-written is being written."""
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "checkpoints" / ".step-000009.partial").mkdir()
    (run / "checkpoints" / ".step-000009.partial" / "state.json").write_text("{}")
    with RunFolder(run).locked():
        before = files(run)
        said = cli("train", config, "--output", run, "--resume").refusal()
        assert "another process is at work" in said
        assert files(run) == before
    resumed(cli, config, run)


def test_a_run_folder_that_was_moved_can_be_resumed(
    cli: WarmCli, config: Path, stopped: Path, reference: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "moved")
    resumed(cli, config, run)
    assert_same(run, reference)


def test_checkpoints_are_in_the_order_of_their_steps_however_many_digits_these_have(tmp_path: Path) -> None:
    steps = (999_998, 999_999, 1_000_000)
    for step in steps:
        checkpoint.folder_of(tmp_path, step).mkdir()
        (checkpoint.folder_of(tmp_path, step) / "state.json").write_text("{}")
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 1_000_000)
    checkpoint.prune(tmp_path, 2)
    assert {checkpoint.step_of(p) for p in tmp_path.iterdir()} == {999_999, 1_000_000}


ONE_MORE_THREAD = "import torch; torch.set_num_threads(torch.get_num_threads() + 1)"


def test_another_number_of_threads_is_refused_because_sums_would_round_differently(
    cli: WarmCli, config: Path, stopped: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    found = cli(
        "train",
        config,
        "--output",
        run,
        "--resume",
        setup=ONE_MORE_THREAD,
    )
    assert found.code == 2
    last = found.stderr.splitlines()[-1]
    assert last.startswith("twofold: ")
    assert f"written with {torch.get_num_threads()} threads and this process has {torch.get_num_threads() + 1}" in last
    assert f"OMP_NUM_THREADS={torch.get_num_threads()}" in last


def test_a_resumed_run_keeps_the_type_that_it_began_with(cli: WarmCli, config: Path, tmp_path: Path) -> None:
    """`auto` is measured, and another measurement may come out otherwise: the run's own choice holds."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    bfloat16 = ("--dtype", "bfloat16", "--training.epochs", "2")
    killed(cli, config, run, KILL_AT_STEP.format(step=5), *bfloat16)
    found = cli("train", config, "--output", run, "--resume", "--dtype", "auto", "--training.epochs", 2)
    assert found.code == 0, found.stderr
    assert cli("train", config, "--output", whole, *bfloat16).code == 0
    assert_same(run, whole)


def test_data_that_changed_since_is_refused(cli: WarmCli, config: Path, train_file: Path, tmp_path: Path) -> None:
    """The order of examples follows from their number; other examples would make another training."""
    data, run = Path(shutil.copy(train_file, tmp_path / "train.jsonl")), tmp_path / "run"
    killed(cli, config, run, KILL_AT_STEP.format(step=8), "--data.train", str(data))
    data.write_text("".join(data.read_text().splitlines(keepends=True)[::-1]))
    found = cli("train", config, "--output", run, "--resume", "--data.train", data)
    assert found.code == 2, found.stderr
    assert "other data" in found.stderr.splitlines()[-1]
