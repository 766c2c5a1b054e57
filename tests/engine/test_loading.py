"""Adapters that are read while streams run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY
from wide_families import sharp

from twofold.adapter.attach import attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.engine import loading
from twofold.engine.request import Request
from twofold.engine.scheduler import Made, Scheduler
from twofold.errors import AdapterFileError, ConfigError

PROMPT = torch.randint(4, VOCABULARY, (9,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def model() -> Any:
    return sharp("llama")


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    attach(model, LoraConfig(r=4, target_modules="all-linear"))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(torch.randn(parameter.shape))
    save_adapter(model, tmp_path / "one")
    detach(model)
    return tmp_path / "one"


def answer(scheduler: Scheduler, worn: dict[str, float]) -> list[int]:
    scheduler.add(Request(token_ids=PROMPT, max_new_tokens=6, adapters=worn))
    said = []
    while not scheduler.idle:
        said += [e.token for e in scheduler.step() if isinstance(e, Made)]
    return said


def test_streams_go_on_while_an_adapter_is_read(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BETWEEN_PASSES", 0.0)
    scheduler, told = Scheduler(model, streams=2, capacity=80), []
    expected = [answer(scheduler, {}), []]
    scheduler.put_adapter("before", folder)
    expected[1] = answer(scheduler, {"before": 1.0})
    stream = scheduler.add(Request(token_ids=PROMPT, max_new_tokens=60))
    scheduler.load_adapter("one", folder, told.append)
    made = []
    while not told:
        made += [e.token for e in scheduler.step() if isinstance(e, Made) and e.stream == stream]
    assert told == [None]
    assert len(made) > 14  # a token a piece, and no piece is more than a module's tensors or a place's factors
    assert made[:6] == expected[0]
    while not scheduler.idle:
        scheduler.step()
    assert answer(scheduler, {"one": 1.0}) == expected[1]
    assert expected[0] != expected[1]


def test_who_waits_hears_why_it_failed_and_nobody_else_does(model: Any, folder: Path, tmp_path: Path) -> None:
    scheduler, told = Scheduler(model, streams=2, capacity=80), []
    scheduler.put_adapter("one", folder)
    for key, path in (("none", tmp_path / "nothing"), ("one", folder), ("two", folder)):
        scheduler.load_adapter(key, path, told.append)
    assert not scheduler.idle
    assert len(answer(scheduler, {})) == 6
    assert [type(t) for t in told] == [AdapterFileError, ConfigError, type(None)]
    assert answer(scheduler, {"two": 1.0}) == answer(scheduler, {"one": 1.0})


def test_what_is_on_its_way_can_be_finished(model: Any, folder: Path) -> None:
    scheduler, told = Scheduler(model, streams=2, capacity=80), []
    scheduler.load_adapter("one", folder, told.append)
    scheduler.finish_loads()
    assert told == [None]
    assert scheduler.idle
