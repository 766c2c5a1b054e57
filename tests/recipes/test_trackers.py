"""Trackers get every step and evaluation, read back from the files that they write."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tiny_runs import Heard, changed

from twofold.errors import ConfigError
from twofold.events import Evaluated, Step
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import train

pytest_plugins = ("tiny_fixtures",)


def test_tensorboard_gets_every_step_and_evaluation(config: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    heard = Heard()
    train(changed(replace(config, trackers=("tensorboard",)), max_steps=4, evaluate_every=2), heard)
    found = EventAccumulator(str(Path(config.output) / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in found.Scalars("train/loss")] == [
        (s.step, pytest.approx(s.loss, rel=1e-6)) for s in heard.of(Step)
    ]
    assert [s.step for s in found.Scalars("evaluation/loss")] == [2, 4]


def history_of(file: Path) -> list[dict[str, float]]:
    """What an offline run holds: after a header of 7 bytes, records in LevelDB's log format, each a protobuf message."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole, found = file.read_bytes(), 7, b"", []
    assert content[:4] == b":W&B"
    while at < len(content):
        if 32768 - at % 32768 < 7:  # a record's header is never split between blocks
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part
            record = Record.FromString(whole)
            found += [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}]
            whole = b""
    return [f for f in found if f]


def without_wandb_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh home folder, and a server that cannot be reached."""
    pytest.importorskip("wandb")
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(home))
    return home


def test_wandb_gets_every_step_and_evaluation_and_nothing_outside_the_run_folder(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a login, with no server to be reached; and its processes end with the run."""
    home = without_wandb_login(tmp_path, monkeypatch)
    before, heard = set(psutil.Process().children(recursive=True)), Heard()
    train(changed(replace(config, trackers=("wandb",)), max_steps=4, evaluate_every=2), heard)
    assert set(psutil.Process().children(recursive=True)) == before
    assert list(home.rglob("*")) == []
    (file,) = (Path(config.output) / "wandb").glob("offline-run-*/*.wandb")
    found = history_of(file)
    assert [(f["_step"], f["train/loss"]) for f in found] == [
        (s.step, pytest.approx(s.loss, rel=1e-6)) for s in heard.of(Step)
    ]
    assert [f["evaluation/loss"] for f in found if "evaluation/loss" in f] == [e.loss for e in heard.of(Evaluated)]


def test_wandb_online_without_a_login_is_refused_before_the_training(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_wandb_login(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match=r"tracker 'wandb' cannot begin: .*unset WANDB_MODE"):
        train(replace(config, trackers=("wandb",)))
    assert not (Path(config.output) / "config.yaml").exists()
