"""Adapters that are read while streams run."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, build_model
from wide_families import sharp

from twofold.adapter.attach import attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.engine import loading, resident
from twofold.engine.request import Request
from twofold.engine.scheduler import Made, Scheduler
from twofold.errors import AdapterFileError, ConfigError
from twofold.native.packed import Room

PROMPT = torch.randint(4, VOCABULARY, (9,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def model() -> Any:
    return sharp("llama")


def write(model: Any, folder: Path, **settings: Any) -> Path:
    attach(model, LoraConfig(**{"r": 4, "target_modules": "all-linear"} | settings))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(torch.randn(parameter.shape))
    save_adapter(model, folder)
    detach(model)
    return folder


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    return write(model, tmp_path / "one")


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


# ---------------------------------------------------------------------------------------------- how large a piece is


def sizes(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, at: int, pieces: Iterable[None]) -> list[list[int]]:
    """For each piece, how many values the arguments had with which a function was called in it."""
    found: list[list[int]] = [[]]
    inner = getattr(where, name)
    with monkeypatch.context() as patched:
        patched.setattr(where, name, lambda *args: found[-1].append(args[at].numel()) or inner(*args))
        for _ in pieces:
            found.append([])
    return found


def test_dora_measures_some_rows_of_one_module_in_a_piece(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dora = write(model, tmp_path / "dora", use_dora=True)
    scheduler = Scheduler(model, streams=2, capacity=80)
    weights = sorted(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    forward = scheduler._forward
    whole = sizes(monkeypatch, resident, "row_norms", 0, forward.reading("one", dora))
    assert sorted(chain(*whole)) == weights
    assert max(map(len, whole)) == 1
    scheduler.put_adapter("whole", dora)
    monkeypatch.setattr(resident, "NORMED_ELEMENTS", 256)
    cut = sizes(monkeypatch, resident, "row_norms", 0, forward.reading("one", dora))
    assert max(chain(*cut)) <= 256
    assert sum(chain(*cut)) == sum(weights)
    assert max(map(len, cut)) == 1
    scheduler.put_adapter("cut", dora)
    assert answer(scheduler, {"cut": 1.0}) == answer(scheduler, {"whole": 1.0}) != answer(scheduler, {})


def test_one_matrix_is_packed_in_a_piece(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(model, streams=2, capacity=80)
    packed = sizes(monkeypatch, Room, "pack", 1, scheduler._forward.reading("one", folder))
    assert sum(map(len, packed)) == len(model.model.layers) * (4 + 7)  # A of each place, B of each module
    assert max(map(len, packed)) == 1


# ---------------------------------------------------------------------------------------------- what it takes of memory


@pytest.mark.parametrize(("r", "filled"), [(4, 16), (16, 16), (20, 32)])
def test_an_adapter_takes_its_factors_and_what_was_packed_of_them(
    model: Any, tmp_path: Path, r: int, filled: int
) -> None:
    folder = write(model, tmp_path / "one", r=r, target_modules=["q_proj", "down_proj"])
    config, layers = model.config, len(model.model.layers)
    d, inner, queries = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    factors = 4 * r * (d + queries + inner + d) * layers
    packed = 4 * filled * (3 * d + queries + inner + d) * layers  # beside q, A of k and v is zeros
    held = {}
    for native in (True, False):
        scheduler = Scheduler(model, streams=2, capacity=80, native=native)
        scheduler.put_adapter("one", folder)
        held[native] = scheduler.adapter_bytes("one")
    assert held == {True: factors + packed, False: factors}


def test_an_adapter_of_a_models_own_forward_takes_its_factors(tmp_path: Path) -> None:
    model = build_model("gpt2")
    folder = write(model, tmp_path / "one", target_modules=["c_attn"])
    scheduler = Scheduler(model, streams=2, capacity=80)
    scheduler.put_adapter("one", folder)
    d = model.config.n_embd
    assert scheduler.adapter_bytes("one") == 4 * 4 * (d + 3 * d) * model.config.n_layer
