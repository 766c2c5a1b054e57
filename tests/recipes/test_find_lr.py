"""`train --find-lr`: every rate from one start, nothing left behind but a page, and a suggestion that holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report_page import Page
from tiny_base import chats, write_jsonl
from warm_cli import WarmCli

from twofold.base.load import DEFAULT_BASE
from twofold.data import home_intents
from twofold.data.examples import DataConfig
from twofold.errors import ConfigError, DataError
from twofold.events import Event, Step
from twofold.recipes import rate_page
from twofold.recipes.find_lr import find_lr
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.train import train
from twofold.training.optim import TrainingConfig
from twofold.training.rate import RateSearch

pytest_plugins = ("tiny_fixtures",)

SEARCH = RateSearch(lowest=1e-3, highest=1e1, rates=5, steps=10)


@pytest.fixture
def config(llama_base: Path, train_file: Path, held_out_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        base=str(llama_base),
        data=DataConfig(train=str(train_file), evaluation=str(held_out_file)),
        adapter=AdapterSettings(r=4, lora_dropout=0.2),
        training=TrainingConfig(batch_size=6),
        output=str(tmp_path / "runs" / "mine"),
        dtype="float32",
        device="cpu",
    )


def losses_of_a_run(config: TrainConfig, rate: float, search: RateSearch) -> tuple[list[float], dict[str, Any]]:
    """An ordinary training at one rate, as the search should have gone through it."""
    heard: list[Event] = []
    short = replace(
        config.training,
        learning_rate=rate,
        schedule="constant",
        warmup=search.warmup,
        max_steps=search.steps,
        epochs=search.steps,
    )
    report = train(replace(config, training=short, output=f"{config.output}-{rate}", verify=False), heard.append)
    return [e.loss for e in heard if isinstance(e, Step)], report


def test_every_trial_is_an_ordinary_run_from_the_same_start(config: TrainConfig) -> None:
    """Bit for bit, dropout included, whatever the trials before it did to the adapter."""
    found = find_lr(config, SEARCH)
    assert [t["learning_rate"] for t in found["trials"]] == SEARCH.grid()
    for trial in found["trials"][0], found["trials"][2]:
        losses, report = losses_of_a_run(config, trial["learning_rate"], SEARCH)
        assert trial["losses"] == losses
        assert trial["loss"] == pytest.approx(sum(losses[-2:]) / 2)
        assert trial["held_out_loss"] == report["evaluation"]["adapter"]["loss"]


def test_the_suggestion_learns_much_more_than_a_low_rate(config: TrainConfig) -> None:
    found = find_lr(config, SEARCH)
    loss = {t["learning_rate"]: t["loss"] for t in found["trials"]}
    rate = found["suggested_learning_rate"]
    assert loss[rate] < 0.7 * found["untouched_loss"]
    assert loss[rate] < loss[SEARCH.lowest]
    assert loss[rate] <= min(loss.values()) + SEARCH.margin * (found["untouched_loss"] - min(loss.values()))


def test_the_untouched_loss_is_that_of_a_rate_too_low_to_matter(config: TrainConfig) -> None:
    """Without dropout, which is off where nothing is trained."""
    config = replace(config, adapter=replace(config.adapter, lora_dropout=0.0))
    found = find_lr(config, RateSearch(lowest=1e-12, highest=1e-11, rates=2, steps=8))
    assert found["trials"][0]["loss"] == pytest.approx(found["untouched_loss"], rel=1e-5)
    assert found["suggested_learning_rate"] is None


def test_steps_of_a_stream_with_nothing_to_learn_say_nothing(config: TrainConfig, tmp_path: Path) -> None:
    """The closing ones among them: what is compared is the mean over the last steps that have something."""
    rows = chats(8)
    for row in rows[5:]:
        row["messages"][1]["content"] = "w " * 200
    data = DataConfig(train=str(write_jsonl(tmp_path / "rows.jsonl", rows)), streaming=True, max_length=60)
    steps = replace(config.training, batch_size=1, max_steps=8)
    one_by_one = replace(config, data=data, adapter=AdapterSettings(r=4), training=steps)
    found = find_lr(one_by_one, RateSearch(lowest=1e-12, highest=1e-11, rates=2, steps=8))
    assert len(found["trials"][0]["losses"]) == 5
    assert found["trials"][0]["loss"] == pytest.approx(found["untouched_loss"], rel=1e-5)
    nothing = replace(data, train=str(write_jsonl(tmp_path / "long.jsonl", rows[5:] * 3 + rows[:1])))
    with pytest.raises(DataError, match="nothing is supervised in the 4 steps of a trial"):
        find_lr(replace(one_by_one, data=nothing), RateSearch(rates=2, steps=4))


def test_a_loss_that_is_not_finite_ends_its_rate_alone(config: TrainConfig) -> None:
    found = find_lr(config, RateSearch(lowest=1e-2, highest=1e30, rates=3, steps=8))
    first, *_, last = found["trials"]
    assert len(first["losses"]) == 8
    assert last["loss"] is None
    assert last["held_out_loss"] is None
    assert last["diverged"]
    assert len(last["losses"]) < 8
    assert found["suggested_learning_rate"] == 1e-2


def test_nothing_is_left_but_a_page_and_the_run_can_begin(config: TrainConfig, tmp_path: Path) -> None:
    found = find_lr(config, SEARCH)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["mine-find-lr.html"]
    page = Page((tmp_path / "runs" / "mine-find-lr.html").read_text(encoding="utf-8"))
    assert found["page"] == str(tmp_path / "runs" / "mine-find-lr.html")
    assert f"Learning rate {found['suggested_learning_rate']:g}" in page.text
    assert found["reason"] in page.text
    (plot,) = [a for a in page.all("svg") if a.get("class") == "plot"]
    assert "by learning rate" in str(plot["aria-label"])
    assert not page.all("script")
    assert not [a for tag in ("link", "img") for a in page.all(tag) if not str(a.get("href", "")).startswith("data:")]
    begun = replace(config.training, learning_rate=found["suggested_learning_rate"], max_steps=1)
    assert train(replace(config, training=begun, verify=False))["steps"] == 1


def test_without_held_out_data_the_training_loss_speaks_alone(config: TrainConfig) -> None:
    found = find_lr(replace(config, data=replace(config.data, evaluation=None)), SEARCH)
    assert {t["held_out_loss"] for t in found["trials"]} == {None}
    assert found["suggested_learning_rate"] is not None
    assert "held-out loss" not in Page(Path(found["page"]).read_text(encoding="utf-8")).text.split("Every rate")[0]


def test_a_page_of_nothing_but_broken_runs_is_still_a_page() -> None:
    trial = {"learning_rate": 1.0, "loss": None, "held_out_loss": None, "diverged": True, "losses": []}
    found = {"suggested_learning_rate": None, "reason": "<b>no</b> rate", "untouched_loss": 2.0, "trials": [trial]}
    page = Page(rate_page.render({**found, "base": "a<b", "r": 4}))
    assert "No rate to suggest" in page.text
    assert "<b>no</b> rate" in page.text
    assert "not finite" in page.text
    assert not page.all("svg")


def test_the_command(cli: WarmCli, config: TrainConfig, tmp_path: Path) -> None:
    flags = ("--base", config.base, "--data.train", config.data.train, "--dtype", "float32", "--output", config.output)
    search = ("--find-lr.lowest", "1e-3", "--find-lr.highest", "1e-1", "--find-lr.rates", 3, "--find-lr.steps", 4)
    found = cli("train", *flags, "--find-lr", *search, "--training.batch-size", 6, "--json").json()
    assert [t["learning_rate"] for t in found["trials"]] == [1e-3, 1e-2, 1e-1]
    assert {len(t["losses"]) for t in found["trials"]} == {4}
    shown = cli("train", *flags, "--find-lr", *search, "--training.batch-size", 6)
    assert shown.code == 0, shown.stderr
    assert f"--training.learning-rate {found['suggested_learning_rate']:g}" in shown.stdout
    assert "--find-lr.steps" in cli("train", "--find-lr", "--help").stdout


def test_mistakes_are_told_before_anything_is_tried(cli: WarmCli, config: TrainConfig) -> None:
    flags = ("--base", config.base, "--data.train", config.data.train, "--output", config.output)
    assert cli("train", *flags, "--find-lr", "--resume").code == 2
    with pytest.raises(ConfigError, match="0 < lowest < highest"):
        RateSearch(lowest=1.0, highest=0.1)


@pytest.mark.slow
def test_the_real_model_on_home_intents(tmp_path: Path) -> None:
    home_intents.write(tmp_path, 96, 24)
    config = TrainConfig(
        base=DEFAULT_BASE,
        data=DataConfig(train=str(tmp_path / "train.jsonl"), evaluation=str(tmp_path / "evaluation.jsonl")),
        adapter=AdapterSettings(r=16, lora_alpha=32),
        training=TrainingConfig(batch_size=8),
        output=str(tmp_path / "run"),
        dtype="float32",
        device="cpu",
    )
    found = find_lr(config, RateSearch(lowest=1e-5, highest=1e-1, rates=5, steps=8))
    assert found["suggested_learning_rate"] == 1e-3
    loss, held_out = ({t["learning_rate"]: t[key] for t in found["trials"]} for key in ("loss", "held_out_loss"))
    assert loss[1e-3] < 0.6 * found["untouched_loss"]
    assert held_out[1e-3] < 0.6 * held_out[1e-5]
