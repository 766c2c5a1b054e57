"""Chat over HTTP with a real engine in its child process: lanes side by side, scales, hot swap, and a child that is killed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from studio_app import SECONDS, Live, eventually, open_studio, sent
from tiny_server import served, write_adapter

from twofold.base.load import Base
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.generate import GenerationConfig, answers, request

pytest_plugins = ("tiny_fixtures",)
ASKED = "colour of the hat 2?"
OPENED = {"base": "work/tiny-llama", "dtype": "float32"}


@pytest.fixture(scope="module")
def play(studio_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A Studio of its own with an open base."""
    root = tmp_path_factory.mktemp("play") / "work"
    shutil.copytree(studio_root, root, ignore=shutil.ignore_patterns("runs", "uploads", "adapters"), symlinks=True)
    with open_studio(root) as found:
        assert "open one first" in found.refusal("/api/play/chat", chat({}), status=503)
        assert found.made("/api/play/open", OPENED)["state"] == "loading"
        ready(found)
        yield found


def ready(live: Live) -> dict[str, Any]:
    found: dict[str, Any] = eventually(lambda: (p := live.get("/api/play").json())["state"] == "ready" and p)
    return found


def chat(*lanes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": ASKED}], "lanes": list(lanes), "max_tokens": 8, **more}


def said(live: Live, *lanes: dict[str, Any], **more: Any) -> list[list[dict[str, Any]]]:
    """Each lane's events."""
    found: list[list[dict[str, Any]]] = [[] for _ in lanes]
    body = chat(*lanes, **more)
    with httpx.stream("POST", f"{live.url}/api/play/chat", json=body, timeout=SECONDS) as answer:
        assert answer.status_code == 200
        for _, _, event in sent(answer.iter_lines()):
            found[event["lane"]].append(event)
    return found


def text(events: list[dict[str, Any]]) -> str:
    return "".join(e.get("text", "") for e in events)


def directly(live: Live, *adapters: str) -> Base:
    """The base with adapters, loaded here."""
    given = [f"{live.root / a.partition(':')[0]}:{a.partition(':')[2] or 1}" for a in adapters]
    return load_with_adapters(str(live.root / "tiny-llama"), given, "float32", "cpu")


def expected(base: Base) -> str:
    return answers(base, [[{"role": "user", "content": ASKED}]], GenerationConfig(max_new_tokens=8))[0]


def test_lanes_answer_side_by_side_as_each_adapter_would_alone(play: Live) -> None:
    lanes = ({}, {"adapter": "work/red"}, {"adapter": "work/green", "scale": 0.5}, {"adapter": "work/red", "scale": 0})
    found = said(play, *lanes)
    alone = [directly(play), directly(play, "red"), directly(play, "green:0.5")]
    assert [text(events) for events in found[:3]] == [expected(base) for base in alone]
    assert text(found[3]) == text(found[0])  # at scale 0 an adapter is not there
    assert len({text(events) for events in found[:3]}) == 3
    assert all(events[-1]["finish_reason"] in ("stop", "length") for events in found)
    first = found[2][0]
    tokens = torch.tensor([request(alone[2], [{"role": "user", "content": ASKED}], GenerationConfig()).token_ids])
    with torch.no_grad():
        likely = alone[2].model(tokens).logits[0, -1].double().log_softmax(-1)
    assert first["logprob"] == pytest.approx(float(likely.max()), abs=1e-3)
    assert first["top"][0]["token"] == first["token"]
    assert [t["logprob"] for t in first["top"]] == sorted((t["logprob"] for t in first["top"]), reverse=True)


def test_an_adapter_that_changes_is_taken_anew_without_loading_the_base(play: Live) -> None:
    engine = _engine(play)
    folder = play.root / "changing"
    base = served(play.root / "tiny-llama").base
    shutil.copytree(play.root / "red", folder)
    before = text(said(play, {"adapter": "work/changing"})[0])
    assert before == text(said(play, {"adapter": "work/red"})[0])
    shutil.rmtree(folder)
    write_adapter(base, folder, 77)
    after = text(said(play, {"adapter": "work/changing"})[0])
    assert after == expected(directly(play, "changing")) != before
    assert _engine(play) == engine
    assert play.made("/api/play/open", OPENED)["state"] == "ready"
    assert "work/changing" in play.get("/api/play").json()["adapters"]


def test_a_lane_that_cannot_answer_says_why_and_the_others_go_on(play: Live, other_base: Path) -> None:
    write_adapter(served(other_base).base, play.root / "foreign", 3)
    found = said(play, {"adapter": "work/foreign"}, {"adapter": "work/none"}, {})
    assert "base" in found[0][0]["error"]["message"]
    assert "nothing lies" in found[1][0]["error"]["message"]
    assert text(found[2])
    assert "lanes" in play.refusal("/api/play/chat", chat())
    assert "scale" in play.refusal("/api/play/chat", chat({"scale": -1}))
    assert "nothing is called" in play.refusal("/api/play/open", {"base": "/etc"}, status=404)


def test_a_killed_engine_is_reported_and_started_again(play: Live) -> None:
    engine = _engine(play)
    with httpx.stream("POST", f"{play.url}/api/play/chat", json=chat({}, max_tokens=200), timeout=SECONDS) as answer:
        events = sent(answer.iter_lines())
        next(events)
        os.kill(engine, signal.SIGKILL)
        last = [event for _, _, event in events][-1]
    assert "gone" in last["error"]["message"]
    told = eventually(lambda: (p := play.get("/api/play").json())["state"] == "loading" and p)
    assert "SIGKILL" in told["message"]
    ready(play)
    assert _engine(play) != engine
    assert text(said(play, {"adapter": "work/red"})[0]) == expected(directly(play, "red"))
    with open_studio(play.root) as second:  # the end of a Studio is the end of its engine
        second.made("/api/play/open", OPENED)
        ended = eventually(lambda: _engines() - {_engine(play)})
    eventually(lambda: not ended & _engines())


def _engines() -> set[int]:
    found = psutil.Process().children(recursive=True)
    return {p.pid for p in found if p.status() != psutil.STATUS_ZOMBIE and "twofold.studio.engine" in p.cmdline()}


def _engine(live: Live) -> int:
    child = live.app.state.studio.play._child
    assert child is not None
    return int(child.process.pid)
