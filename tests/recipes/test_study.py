"""`study --quick`: each reading on a tiny base; resuming; the page that is made of the files."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny_base import chats, write_jsonl

from twofold.adapter.attach import adapters_of
from twofold.adapter.config import LoraConfig
from twofold.base.load import load_base
from twofold.data.examples import DataConfig
from twofold.errors import ConfigError, RunError
from twofold.events import silent
from twofold.recipes import proving
from twofold.recipes.intents import shares_right
from twofold.recipes.materials import Ground
from twofold.recipes.proving import nothing_changes
from twofold.recipes.studies import STUDIES, Arm, Study
from twofold.recipes.study import outlook, shortened, study
from twofold.recipes.study_paper import write_paper
from twofold.recipes.study_reading import lowest_between, outcome, read
from twofold.recipes.tasks import TASKS

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def ground(llama_base: Path, held_out_file: Path, tmp_path: Path) -> Ground:
    train, evaluation = (
        write_jsonl(tmp_path / f"{name}.jsonl", as_intents(rows))
        for name, rows in {"train": chats(16), "evaluation": chats(7, start=40)}.items()
    )
    return Ground(str(llama_base), "causal-lm", train, evaluation, {"others": held_out_file})


def as_intents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        row["messages"][-1]["content"] = json.dumps({"intent": row["messages"][-1]["content"]})
    return rows


def fitted(asked: Study) -> Study:
    """For the tiny base: ranks that its widths hold, and as few trainings as a reading needs."""
    few = shortened(asked)
    apart = asked.apart or any(a.full for a in asked.arms)
    arms = tuple(
        replace(
            a,
            settings={k: min(v, 16) if k == "adapter.r" else v for k, v in a.settings.items()},
            rates=a.rates[-1:] if a.full or asked.apart else a.rates,
        )
        for a in (few.arms[::2] if asked.apart and len(few.arms) > 2 else few.arms)
    )
    return replace(few, arms=arms, seeds=1 if apart else few.seeds)


APART = pytest.param("costs-less", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["forgets-less", APART, "rate-by-rank", "low-rank", "proved"])
def test_every_reading(name: str, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "ROUNDS", 2)
    monkeypatch.setattr(proving, "TOKENS", 4)
    asked = fitted(STUDIES[name])
    found = study(asked, tmp_path / "work", tmp_path / "evidence", ground=ground)
    assert found["trainings"] == sum(len(a.rates) for a in asked.arms) * (asked.seeds if asked.every_rate else 1) + (
        0 if asked.every_rate else len(asked.arms) * (asked.seeds - 1)
    )
    written = json.loads((tmp_path / "evidence" / f"{asked.name}.json").read_text())
    assert written["verdict"] == found["verdict"]
    for picture in found["pictures"]:
        ElementTree.parse(tmp_path / "evidence" / picture)
    assert not list((tmp_path / "work").rglob("model.safetensors"))
    if name == "proved":
        wide = found["rows"][next(n for n in found["rows"] if n.startswith("float32"))]
        assert wide["verification"]["passed"]
        for promises in [row["probes"]["promises"] for row in found["rows"].values() if row["probes"]]:
            assert promises["zero_at_start"]
            assert set(promises["milliseconds_per_token"]) == {"base", "adapter apart", "merged"}
    (tmp_path / "evidence" / "discussion.md").write_text("## What to take from it\n\nLittle.\n")
    page = write_paper(tmp_path / "evidence", {asked.name: asked, "targets": STUDIES["targets"]}).read_text()
    assert found["verdict"] in page
    assert "Little." in page
    assert "twofold study targets" in page.partition("## Not run yet")[2]


def test_studies_of_one_folder_share_their_trainings(ground: Ground, tmp_path: Path) -> None:
    first, second = (fitted(STUDIES[n]) for n in ("matches-full", "forgets-less"))
    arms = tuple(a for a in first.arms if not a.full)
    trained = study(replace(first, arms=arms), tmp_path / "work", tmp_path / "evidence", ground=ground)
    results = tmp_path / "work" / first.folder / "results.json"
    before = results.read_bytes()
    read = study(replace(second, arms=arms[:1]), tmp_path / "work", tmp_path / "evidence", ground=ground)
    assert results.read_bytes() == before
    assert read["trainings"] < trained["trainings"]
    assert all(trained["rows"][n] == row for n, row in read["rows"].items())


def test_a_fresh_adapter_that_does_change_the_base_is_seen_to(ground: Ground) -> None:
    base = load_base(ground.base, "float32", "cpu")
    examples = TASKS["causal-lm"].examples(str(ground.evaluation), DataConfig(train=""), base, silent).items
    assert nothing_changes(base, examples, LoraConfig(r=4))[0]
    assert not nothing_changes(base, examples, LoraConfig(r=4, init_lora_weights=False))[0]
    assert not adapters_of(base.model)


def test_what_was_trained_is_not_trained_again_and_what_is_missing_is(ground: Ground, tmp_path: Path) -> None:
    asked = replace(fitted(STUDIES["targets"]), seeds=2, probes=("answers",))
    first = study(asked, tmp_path / "work", tmp_path / "evidence", ground=ground)
    results = tmp_path / "work" / asked.name / "results.json"
    rows = json.loads(results.read_text())
    best = outcome(asked, rows, asked.arms[0].name)
    assert len(best.rows) == 2
    assert best.spread is not None
    gone = next(n for n, r in rows.items() if r.get("seed") == 1)
    kept = next(n for n, r in rows.items() if r.get("seed") == 0)
    loss = rows.pop(gone)["loss"]
    rows[kept]["spent"] = 12345.0
    results.write_text(json.dumps(rows))
    again = study(asked, tmp_path / "work", tmp_path / "evidence", ground=ground)
    assert again["rows"][gone]["loss"] == pytest.approx(loss, rel=1e-6)
    assert again["rows"][kept]["spent"] == 12345.0
    assert again["table"] == first["table"]
    assert first["table"][0][-3:-1] == ["intent right", "answer right"]
    assert all(row["probes"]["answers"] == {"intent right": 0, "answer right": 0} for row in rows.values())


def test_a_rate_that_is_added_is_trained_beside_those_that_were(ground: Ground, tmp_path: Path) -> None:
    few = fitted(STUDIES["targets"])
    asked = replace(few, arms=few.arms[:1], seeds=1)
    fewer = replace(asked, arms=(replace(few.arms[0], rates=few.arms[0].rates[:1]),))
    first = study(fewer, tmp_path / "work", tmp_path / "evidence", ground=ground)["rows"]
    both = study(asked, tmp_path / "work", tmp_path / "evidence", ground=ground)["rows"]
    assert len(both) == 1 + len(few.arms[0].rates)
    assert {name: both[name] for name in first} == first


def test_what_an_interrupted_start_spent_is_counted(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(fitted(STUDIES["targets"]), arms=fitted(STUDIES["targets"]).arms[:1], seeds=1)

    def stopped(*_: Any) -> None:
        time.sleep(0.5)
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr("twofold.recipes.study.run_group", stopped)
        with pytest.raises(KeyboardInterrupt):
            study(asked, tmp_path / "work", tmp_path / "evidence", ground=ground)
    started = time.perf_counter()
    found = study(asked, tmp_path / "work", tmp_path / "evidence", ground=ground)
    assert 0.5 <= found["compute_seconds"] <= 0.6 + time.perf_counter() - started


def test_an_arm_that_always_diverges_is_named_at_once(ground: Ground, tmp_path: Path) -> None:
    first, second, *_ = fitted(STUDIES["targets"]).arms
    asked = replace(fitted(STUDIES["targets"]), arms=(replace(first, rates=(1e30, 1e31)), second))
    for _ in range(2):
        with pytest.raises(RunError, match=f"every training of '{first.name}' in {asked.name} diverged"):
            study(asked, tmp_path / "work", tmp_path / "evidence", ground=ground)
    rows = json.loads((tmp_path / "work" / asked.name / "results.json").read_text())
    assert second.name not in {row.get("arm") for row in rows.values()}


def parabola(arm: str, best: float, rates: tuple[float, ...], seed: int) -> dict[str, dict[str, object]]:
    """Trainings whose losses lie on a parabola around a best rate, in logarithms."""
    losses = {rate: math.exp(math.log10(rate / best) ** 2 - 1) for rate in rates}
    return {
        f"{arm} | {rate:g} | {seed}": {"arm": arm, "rate": rate, "seed": seed, "loss": loss}
        for rate, loss in losses.items()
    }


def test_the_best_rate_is_found_between_those_tried_and_followed_along_a_setting(tmp_path: Path) -> None:
    asked = STUDIES["alpha-by-rate"]
    rows: dict[str, dict[str, object]] = {"untouched": {"loss": 50.0}}
    for seed, off in enumerate((0.8, 1.0, 1.25)):
        for arm in asked.arms:
            best = 0.03 * off * arm.settings["adapter.lora_alpha"] ** -0.75
            rows |= parabola(arm.name, best, arm.rates, seed)
    found = read(asked, rows, tmp_path)
    assert "lora_alpha it goes with the exponent: alpha -0.75 ± 0.00." in found.verdict
    assert "alpha = 32 at 0.0022 (×/÷ 1.25)" in found.verdict
    assert "not shown" not in found.pictures["alpha-by-rate.svg"]
    diverged = rows | parabola(asked.arms[0].name, 1e-9, asked.arms[0].rates[-1:], seed=0)
    drawn = read(asked, diverged, tmp_path).pictures["alpha-by-rate.svg"]
    assert "not shown: 1 that ended above the untouched base" in "".join(ElementTree.fromstring(drawn).itertext())


def test_where_all_diverged_all_are_drawn(tmp_path: Path) -> None:
    asked = STUDIES["alpha-by-rate"]
    rows: dict[str, dict[str, object]] = {"untouched": {"loss": 1e-9}}
    for arm in asked.arms:
        rows |= parabola(arm.name, 1e-3, arm.rates, seed=0)
    assert "not shown" not in read(asked, rows, tmp_path).pictures["alpha-by-rate.svg"]


def test_of_losses_that_are_all_alike_the_first_between_is_the_lowest() -> None:
    assert lowest_between([(0.0, 1.0), (1.0, 1.0), (2.0, 1.0)]) == 0.0
    assert lowest_between([(0.0, 2.0), (1.0, 1.0), (2.0, 2.0)]) == 1.0


@pytest.mark.parametrize("end", [1e-5, 1.0])
def test_a_best_rate_at_an_end_is_that_end(end: float) -> None:
    rates = (1e-3, 1e-2, 1e-1)
    points = [(math.log10(rate), math.log10(rate / end) ** 2) for rate in rates]
    assert lowest_between(points) == math.log10(min(rates, key=lambda rate: abs(math.log10(rate / end))))


def test_a_line_names_arms_that_are_there() -> None:
    for asked in STUDIES.values():
        settings = {arm.name: arm.settings for arm in asked.arms}
        for names in asked.lines.values():
            assert len({settings[name][asked.over] for name in names}) == len(names) > 1


def test_the_outlook_counts_what_is_left(tmp_path: Path) -> None:
    """Of the study itself: `rates` is also the folder of alpha-by-rate, and some arms are in both."""
    asked = STUDIES["rate-by-rank"]
    arm = asked.arms[0]
    rows: dict[str, dict[str, object]] = {"untouched": {"loss": 1.0}}
    rows["r = 16, alpha = 8 | 0.0032 | 0"] = {"arm": "r = 16, alpha = 8", "rate": 0.0032, "spent": 1e6}
    for rate, spent in zip(arm.rates, (10.0, 30.0), strict=False):
        rows[f"{arm.name} | {rate:g} | 0"] = {"arm": arm.name, "rate": rate, "loss": rate, "spent": spent}
    (tmp_path / asked.folder).mkdir()
    (tmp_path / asked.folder / "results.json").write_text(json.dumps(rows))
    rates, unknown = outlook(["rate-by-rank", "variants"], tmp_path, lambda s: s)
    planned = sum(3 * len(each.rates) for each in asked.arms)
    assert (rates["done"], rates["planned"], rates["seconds_left"]) == (2, planned, 20.0 * (planned - 2))
    assert unknown["done"] == 0
    assert unknown["seconds_left"] is None


def test_the_outlook_knows_which_rate_the_other_seeds_run_with(tmp_path: Path) -> None:
    asked = STUDIES["matches-full-verses"]
    rows: dict[str, dict[str, object]] = {"untouched": {"loss": 1.0}}
    for arm in asked.arms:
        for i, rate in enumerate(arm.rates):
            rows[f"{arm.name} | {rate:g} | 0"] = {"arm": arm.name, "rate": rate, "loss": 3.0 - i, "spent": 1.0}
    best, other = asked.arms[0].rates[-1], asked.arms[0].rates[0]
    for rate in (best, other):
        rows[f"{asked.arms[0].name} | {rate:g} | 1"] = {"arm": asked.arms[0].name, "rate": rate, "spent": 1.0}
    (tmp_path / asked.name).mkdir()
    (tmp_path / asked.name / "results.json").write_text(json.dumps(rows))
    (told,) = outlook([asked.name], tmp_path, lambda s: s)
    assert told["planned"] - told["done"] == told["seconds_left"] == 2 * len(asked.arms) - 1


def test_every_study_is_well_formed() -> None:
    """Settings are refused here, and not after an hour."""
    from twofold.recipes.grid import changed
    from twofold.recipes.settings import TrainConfig

    plain = TrainConfig(data=DataConfig(train="x"))
    for asked in STUDIES.values():
        assert asked.hours <= 3
        assert len({a.name for a in asked.arms}) == len(asked.arms)
        for arm in asked.arms:
            assert changed(plain, {**asked.common, **arm.settings}).adapter
    with pytest.raises(ConfigError):
        changed(plain, Arm(name="x", settings={"adapter.rank": 3}, rates=(1.0,)).settings)


def test_answers_are_right_by_what_they_say() -> None:
    expected = ['{"intent":"HassTurnOn","slots":{"area":"den","name":"lamp"}}'] * 5
    given = [
        'Sure: {"intent": "HassTurnOn", "slots": {"name": "lamp", "area": "den"}} as you wish',
        '{"intent":"HassTurnOn","slots":{"area":"den"}}',
        '{"intent":"HassTurnOff","slots":{"area":"den","name":"lamp"}}',
        '{"intent":"HassTurnOn","slots":',
        "[1]",
    ]
    assert shares_right(given, expected) == (2 / 5, 1 / 5)
