"""Rank after the fact: losses of cut adapters are those of adapters that were written at that rank."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import changed
from warm_cli import WarmCli

from twofold.adapter.files import open_adapter
from twofold.errors import ConfigError
from twofold.merging.resize import Size
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.rank_after import Tolerated, smallest
from twofold.recipes.resize import resize
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import train

pytest_plugins = ("tiny_fixtures",)


def test_the_curve_is_that_of_adapters_written_at_each_rank(
    config: TrainConfig, cli: WarmCli, held_out_file: Path, tmp_path: Path
) -> None:
    adapter = replace(config.adapter, r=6, lora_bias=True)
    config = changed(replace(config, adapter=adapter, verify=False), epochs=6)
    trained = train(config)["adapter"]
    flags = ("--base", config.base, "--dtype", "float32", "--device", "cpu", "--data", held_out_file, "--json")
    found = cli("resize", trained, "--tolerance", 0.05, "-o", tmp_path / "small", *flags).json()
    assert list(map(int, found["losses"])) == [1, 2, 3, 4, 5, 6]
    assert found["losses"]["1"] > found["losses"]["6"]
    for r in (1, 3, 6):
        resize(trained, tmp_path / f"r{r}", Size(r=r))
        asked = ("--adapter", tmp_path / f"r{r}", *flags)
        assert cli("eval", *asked).json()["loss"] == pytest.approx(found["losses"][str(r)], rel=1e-5)
    assert found["r"] == smallest({int(r): loss for r, loss in found["losses"].items()}, 0.05)
    assert open_adapter(tmp_path / "small").config.r == found["r"]
    assert load_with_adapters(config.base, [str(tmp_path / "small")], "float32", "cpu")
    assert (tmp_path / "small-ranks.svg").is_file()
    assert "exists already" in cli("resize", trained, "--tolerance", 0.05, "-o", tmp_path / "small", *flags).refusal()


@pytest.mark.parametrize(
    "beyond",
    [{"use_dora": True}, {"target_modules": ("q_proj",), "target_parameters": ("mlp.down_proj.weight",)}],
    ids=lambda settings: next(reversed(settings)),
)
def test_factors_that_are_not_plain_ones_are_refused(
    beyond: dict[str, Any], config: TrainConfig, cli: WarmCli, held_out_file: Path, tmp_path: Path
) -> None:
    asked = replace(config, adapter=replace(config.adapter, **beyond), verify=False)
    adapter = train(changed(asked, max_steps=1))["adapter"]
    flags = ("--base", config.base, "--dtype", "float32", "--data", held_out_file, "-o", tmp_path / "small")
    found = cli("resize", adapter, "--tolerance", 0.05, *flags)
    assert found.code == 2
    assert "more than plain factors" in found.stderr


def test_what_is_held_whole_stays_as_it_is(
    config: TrainConfig, cli: WarmCli, held_out_file: Path, tmp_path: Path
) -> None:
    adapter = replace(config.adapter, r=2, bias="all", modules_to_save=("lm_head",))
    trained = train(changed(replace(config, adapter=adapter, verify=False), max_steps=3))["adapter"]
    flags = ("--base", config.base, "--dtype", "float32", "--device", "cpu", "--data", held_out_file, "--json")
    found = cli("resize", trained, "--tolerance", 10, "-o", tmp_path / "small", *flags).json()
    assert found["r"] == 1
    asked = ("--adapter", tmp_path / "small", *flags)
    assert cli("eval", *asked).json()["loss"] == pytest.approx(found["losses"]["1"], rel=1e-5)


def test_numbers_that_mean_nothing_choose_no_rank() -> None:
    assert smallest({4: 1.0, 3: 1.0, 2: math.nan, 1: 1.0}, 0.01) == 3
    for tolerance in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="tolerance is"):
            Tolerated(tolerance=tolerance, data="held_out.jsonl")


def test_a_dip_below_the_tolerance_does_not_count_if_a_larger_rank_is_above() -> None:
    assert smallest({4: 1.0, 3: 1.005, 2: 1.1, 1: 1.0}, 0.01) == 3
    assert smallest({4: 1.0, 3: 2.0}, 0.01) == 4
