"""Real, tiny trainings over HTTP: begun, followed, stopped, resumed, killed; the state is on disk and in no process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from studio_app import Live, eventually, open_studio
from tiny_runs import adapter_tensors
from warm_cli import WarmCli

from twofold.adapter.files import open_adapter
from twofold.adapter.updates import updates_of
from twofold.studio.records import START, last_records, read_from
from twofold.studio.roots import open_roots
from twofold.studio.runbook import Run, RunBook

pytest_plugins = ("tiny_fixtures",)


def config(**training: Any) -> dict[str, Any]:
    """A training of a second, once it is loaded."""
    settings = {"batch_size": 6, "epochs": 4, "learning_rate": 0.02, **training}
    return {
        "base": "work/tiny-llama",
        "data": {"train": "work/data.jsonl", "evaluation": "work/held_out.jsonl"},
        "adapter": {"r": 4},
        "training": settings,
        "dtype": "float32",
        "device": "cpu",
        "verify": False,
    }


LONG = {"epochs": 4000, "checkpoint_every": 100000}
"""More than a test waits for; nothing is kept of it unless it is asked to stop."""


def test_a_run_from_the_first_click_to_its_adapter(live: Live) -> None:
    foreseen = live.made("/api/preflight", {"config": config()})
    assert foreseen["steps"] == 16
    name = live.made("/api/runs", {"config": config(spectrum_every=5, evaluate_every=8)})["name"]
    with live.follow(name) as stream:
        heard = list(stream)
    kinds = [e["event"] for kind, _, e in heard if kind == "message"]
    states = [e["state"] for kind, _, e in heard if kind == "state"]
    assert states[0] == "starting"
    assert states[-1] == "finished"
    assert [e["step"] for k, _, e in heard if k == "message" and e["event"] == "step"] == list(range(1, 17))
    assert kinds.count("spectrum") == 4
    assert kinds.count("evaluated") == 2
    details = live.get(f"/api/runs/{name}").json()
    assert details["preflight"]["train"] == foreseen["train"]
    assert details["config"]["data"]["train"] == "work/data.jsonl"
    assert details["report"]["steps"] == details["step"] == 16
    assert details["adapter"] == f"work/runs/{name}/adapter"
    assert details["adapter"] in {a["id"] for a in live.get("/api/adapters").json()["adapters"]}
    last = [e for _, _, e in heard if e.get("event") == "spectrum"][-1]
    kept = live.root / "runs" / name / "adapter-last"  # there if an earlier step was the best
    _same_spectra(last["modules"], kept if kept.exists() else kept.with_name("adapter"))
    _joins_in_the_middle(live, name, heard)
    assert "is finished" in live.refusal(f"/api/runs/{name}/resume")
    assert "nothing to stop" in live.refusal(f"/api/runs/{name}/stop")
    assert "is there already" in live.refusal("/api/runs", {"config": config(), "name": name})


def _same_spectra(told: dict[str, list[float]], adapter: Path) -> None:
    """What the last event says is what a decomposition of the whole update finds in the file."""
    for name, update in updates_of(open_adapter(adapter)).items():
        values = torch.linalg.svdvals(update.delta().double())[: update.rank]
        assert told[name] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-5)


def _joins_in_the_middle(live: Live, name: str, heard: list[tuple[str, str, Any]]) -> None:
    """A page that reloads goes on where it was, by query or by header, and gets nothing twice."""
    messages = [(at, e) for kind, at, e in heard if kind == "message"]
    at, rest = messages[6][0], [e for _, e in messages[7:]]
    assert live.get(f"/api/runs/{name}/events", params={"since": at}).json()["events"] == rest
    with live.follow(name, **{"last-event-id": at}) as stream:
        assert [e for kind, _, e in stream if kind == "message"] == rest
    strange = live.get(f"/api/runs/{name}/events", params={"since": "17-4"}).json()
    assert strange["anew"]
    assert len(strange["events"]) == len(messages)


def test_stopped_and_resumed_it_ends_with_the_same_bits(live: Live) -> None:
    whole = {**config(epochs=40), "data": {"train": "work/data.jsonl"}}
    undisturbed = live.made("/api/runs", {"config": whole, "name": "undisturbed"})["name"]
    name = live.made("/api/runs", {"config": whole, "name": "stopped"})["name"]
    assert "is there already" in live.refusal("/api/runs", {"config": whole, "name": name})
    eventually(lambda: live.steps(name))
    assert "at work already" in live.refusal(f"/api/runs/{name}/resume")
    assert live.made(f"/api/runs/{name}/stop")["state"] == "stopping"
    assert live.wait(name, "stopped", "finished") == "stopped"
    steps = live.steps(name)
    assert 0 < steps[-1] < 160
    assert live.made(f"/api/runs/{name}/resume")["state"] == "starting"
    live.wait(name, "finished")
    assert live.steps(name) == list(range(1, 161))
    live.wait(undisturbed, "finished")
    tensors, others = (adapter_tensors(live.root / "runs" / n / "adapter") for n in (name, undisturbed))
    assert all(torch.equal(tensors[k], others[k]) for k in others)


def test_a_killed_training_says_so_and_goes_on(live: Live) -> None:
    name = live.made("/api/runs", {"config": config(epochs=400, checkpoint_every=1), "name": "killed"})["name"]
    with live.follow(name) as stream:
        for kind, _, event in stream:
            if kind == "message" and event["event"] == "step" and event["step"] >= 3:
                os.kill(_pid(live, name), signal.SIGKILL)
                break
        last = [event for kind, _, event in stream if kind == "state"][-1]
    assert last["state"] == "failed"
    assert "killed" in last["message"]
    live.made(f"/api/runs/{name}/resume")
    eventually(lambda: live.state(name) == "running")
    before = live.steps(name)[-1]
    eventually(lambda: live.steps(name)[-1] > before)
    live.made(f"/api/runs/{name}/stop")
    live.wait(name, "stopped")
    steps = live.steps(name)
    assert steps == list(range(1, steps[-1] + 1))


def test_a_training_outlives_its_studio_and_is_found_again(studio_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "work"
    root.mkdir()
    for name in ("tiny-llama", "data.jsonl", "held_out.jsonl"):
        _copy(studio_root / name, root / name)
    with open_studio(root) as first:
        name = first.made("/api/runs", {"config": config(**LONG)})["name"]
        eventually(lambda: first.steps(name))
    with open_studio(root) as second, open_studio(root) as tab:
        assert second.state(name) == tab.state(name) == "running"
        before = second.steps(name)[-1]
        eventually(lambda: second.steps(name)[-1] > before)
        second.made(f"/api/runs/{name}/stop")
        assert tab.wait(name, "stopped") == "stopped"
        assert second.get("/api/runs").json()["runs"] == tab.get("/api/runs").json()["runs"]


def _copy(source: Path, to: Path) -> None:
    shutil.copytree(source, to) if source.is_dir() else shutil.copy(source, to)


def test_mistakes_are_told_before_or_after_the_start(live: Live) -> None:
    wrong = config()
    wrong["training"] = {"learning_rte": 1.0, "batch_size": 0}
    assert "did you mean 'learning_rate'" in live.refusal("/api/runs", {"config": wrong})
    assert "cannot name a run" in live.refusal("/api/runs", {"config": config(), "name": "../x"})
    assert live.get("/api/runs/..%2f..").status_code == 404
    assert live.get("/api/runs/none").status_code == 404
    target = {**config(), "adapter": {"r": 4, "target_modules": ["q_prj"]}}
    assert "q_proj" in live.refusal("/api/preflight", {"config": target})
    name = live.made("/api/runs", {"config": target, "name": "mistaken"})["name"]
    live.wait(name, "failed")
    message = live.get(f"/api/runs/{name}").json()["message"]
    assert "q_proj" in message
    assert str(live.root) not in message


def test_a_run_that_was_started_elsewhere_is_shown(live: Live, cli: WarmCli) -> None:
    folder = live.root / "runs" / "by-hand"
    data, base = live.root / "data.jsonl", live.root / "tiny-llama"
    flags = ("--training.epochs", 1, "--dtype", "float32", "--no-verify")
    found = cli("train", "--base", base, "--data.train", data, "--output", folder, *flags)
    assert found.code == 0, found.stderr
    row = next(r for r in live.get("/api/runs").json()["runs"] if r["name"] == "by-hand")
    assert row["state"] == "finished"
    assert row["step"] == row["steps"] == 2


# ---------------------------------------------------------------------------------------------- events on disk


def _pid(live: Live, name: str) -> int:
    return int(json.loads(Run(live.root / "runs" / name).note.read_text())["pid"])


def line(step: int, **more: Any) -> str:
    return json.dumps({"event": "step", "step": step, "time": step / 10, **more}) + "\n"


def test_a_cursor_knows_the_file_that_it_was_made_for(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    assert read_from(file, START).events == []
    file.write_text(line(1) + line(2) + '{"event": "st')
    first = read_from(file, START)
    assert [e["step"] for _, e in first.events] == [1, 2]  # the third is not whole yet
    file.write_text(line(1) + line(2) + line(3))
    second = read_from(file, first.cursor)
    assert ([e["step"] for _, e in second.events], second.anew) == ([3], False)
    assert read_from(file, second.cursor).events == []
    file.write_text(line(1) + line(2, again=1) + line(3))  # resumed from step 1: the second is another
    third = read_from(file, first.cursor)
    assert ([e["step"] for _, e in third.events], third.anew) == ([1, 2, 3], True)
    file.unlink()
    assert read_from(file, first.cursor).anew


@pytest.mark.parametrize(
    "cursor", ["", "x", "-1-2", "99999999999999999999-1", "999999999999999-1", "5", "0-1", "1e3-4"]
)
def test_a_strange_cursor_begins_anew(tmp_path: Path, cursor: str) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text(line(1) + line(2))
    found = read_from(file, cursor)
    assert found.anew
    assert len(found.events) == 2


@pytest.mark.parametrize("damaged", [b"\0\0\0", b"\xff\r\xfe", b'{"event": "st', b"7", b""])
def test_a_damaged_line_hides_nothing_else(tmp_path: Path, damaged: bytes) -> None:
    """Neither the events behind it nor the other runs."""
    for name in ("damaged", "whole"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("base: tiny\n")
        (folder / "events.jsonl").write_bytes(line(1).encode() + line(2).encode())
    file = tmp_path / "runs" / "damaged" / "events.jsonl"
    file.write_bytes(line(1).encode() + damaged + b"\n" + line(2).encode() + damaged + b"\n")
    rows = RunBook(open_roots((tmp_path,))).rows()
    assert {row["name"]: row["step"] for row in rows} == {"damaged": 2, "whole": 2}
    first = read_from(file, START)
    assert [e["step"] for _, e in first.events] == [1, 2]
    with file.open("a") as more:
        more.write(line(3))
    second = read_from(file, first.cursor)
    assert ([e["step"] for _, e in second.events], second.anew) == ([3], False)


def test_long_lines_are_found_from_the_end(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    spectrum = json.dumps({"event": "spectrum", "step": 1, "modules": {"q": [0.1] * 40_000}}) + "\n"
    file.write_text(line(1) + spectrum + spectrum)
    assert last_records(file, ("step",), within=None)[-1]["step"] == 1
    assert last_records(file, ("step",), within=1) == []
    assert last_records(file, ("stopped",), within=None) == []
    cursor = read_from(file, START).cursor
    assert read_from(file, cursor).events == []
    assert not read_from(file, cursor).anew
