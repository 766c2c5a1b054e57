"""Runs on the same data, side by side in the report of the one that ended last."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report_page import Page
from tiny_base import chats, write_jsonl
from tiny_runs import changed

from twofold.recipes.others import MOST, others_table
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import train

pytest_plugins = ("tiny_fixtures",)


def beside(config: TrainConfig, name: str, **changes: Any) -> TrainConfig:
    """The same run in the folder beside, with changes."""
    return replace(config, output=str(Path(config.output).parent / name), **changes)


def page_of(report: dict[str, Any]) -> str:
    return Page((Path(report["run"]) / "report.html").read_text()).text


def test_a_quantised_run_is_shown_beside_the_one_before(config: TrainConfig) -> None:
    config = changed(config, max_steps=6)
    first = train(beside(config, "lora"))
    assert [row["run"] for row in first["same_data"]] == ["lora"]
    assert "Other runs on the same data" not in page_of(first)
    report = train(beside(config, "qlora", quantization="nf4"))
    rows = {row["run"]: row for row in report["same_data"]}
    assert rows.keys() == {"lora", "qlora"}
    for name, own in (("lora", first), ("qlora", report)):
        assert rows[name]["this"] == (name == "qlora")
        assert rows[name]["quantization"] == own["quantization"]
        assert rows[name]["r"] == 4
        assert rows[name]["settings"] == {}
        assert rows[name]["base_loss"] == own["evaluation"]["base"]["loss"]
        assert rows[name]["adapter_loss"] == own["evaluation"]["adapter"]["loss"]
        assert rows[name]["peak_memory_bytes"] == own["peak_memory_bytes"]
        assert rows[name]["examples_per_second"] == pytest.approx(35 / own["seconds"])  # 6 + 6 + 6 + 5, then 6 + 6
    assert [r["adapter_loss"] for r in report["same_data"]] == sorted(r["adapter_loss"] for r in rows.values())
    assert json.loads((Path(report["run"]) / "report.json").read_text())["same_data"] == report["same_data"]
    text = page_of(report)
    for said in (
        "Other runs on the same data",
        "qlora (this run)",
        "nf4",
        "plain LoRA",
        f"{rows['lora']['adapter_loss']:.4f}",
    ):
        assert said in text, said


def test_what_makes_runs_differ_is_named(config: TrainConfig) -> None:
    config = changed(config, max_steps=1)
    train(beside(config, "a"))
    adapter = replace(config.adapter, r=2, use_dora=True)
    report = train(changed(beside(config, "b", adapter=adapter), learning_rate=0.01))
    rows = {row["run"]: row for row in report["same_data"]}
    assert {name: row["r"] for name, row in rows.items()} == {"a": 4, "b": 2}
    assert rows["a"]["settings"] == {"adapter.use_dora": False, "training.learning_rate": 0.02}
    assert rows["b"]["settings"] == {"adapter.use_dora": True, "training.learning_rate": 0.01}
    assert "no use_dora, learning_rate 0.02" in page_of(report)


def test_other_data_another_base_and_unfinished_runs_are_not_beside_it(
    config: TrainConfig, other_base: Path, tmp_path: Path
) -> None:
    config = changed(config, max_steps=1)
    train(beside(config, "same"))
    train(beside(config, "other-base", base=str(other_base)))
    rows = write_jsonl(tmp_path / "rows.jsonl", chats(9, start=7))
    train(beside(config, "other-data", data=replace(config.data, train=str(rows))))
    train(beside(config, "other-held-out", data=replace(config.data, evaluation=str(rows))))
    for name, text in (("broken", "{"), ("old", "{}"), ("odd", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(text)
    (tmp_path / "unfinished").mkdir()
    moved = write_jsonl(
        tmp_path / "moved.jsonl", [json.loads(r) for r in Path(config.data.train).read_text().splitlines()]
    )
    report = train(beside(config, "last", data=replace(config.data, train=str(moved))))
    assert {row["run"] for row in report["same_data"]} == {"same", "last"}


def test_a_folder_of_very_many_runs_leaves_a_table_that_ends() -> None:
    rows = [
        {"run": f"run-{i}", "this": i == 90, "dtype": "float32", "r": 4, "settings": {}, "adapter_loss": i / 10}
        for i in range(100)
    ]
    table = others_table({"same_data": rows})
    assert table is not None
    assert [row[0] for row in table.rows] == [f"run-{i}" for i in range(MOST)] + ["run-90 (this run)"]
    assert f"{100 - MOST - 1} more are in report.json" in table.caption
