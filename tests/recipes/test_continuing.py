"""`train`: the best adapter and the last, and runs that go on from an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_base import pairs, write_jsonl
from tiny_runs import Heard, adapter_tensors, changed
from warm_cli import WarmCli

from twofold.adapter.files import open_adapter
from twofold.base.load import load_base
from twofold.config import as_dict
from twofold.data.examples import DataConfig
from twofold.errors import ConfigError, ForeignBaseError
from twofold.events import Evaluated, Step
from twofold.recipes.settings import AdapterSettings, TrainConfig, read_config
from twofold.recipes.train import train

pytest_plugins = ("tiny_fixtures",)


def test_early_stopping_keeps_the_best_adapter_and_the_last_apart(config: TrainConfig, tmp_path: Path) -> None:
    """The held-out answers contradict the training data, so that its loss soon rises."""
    wrong = [(q, a[::-1]) for q, a in pairs(7, start=40)]
    held_out = write_jsonl(tmp_path / "wrong.jsonl", [{"prompt": q, "completion": a} for q, a in wrong])
    config = replace(config, data=replace(config.data, evaluation=str(held_out)))
    heard = Heard()
    report = train(changed(config, epochs=40, evaluate_every=2, early_stopping=3, learning_rate=0.05), heard)
    seen = heard.of(Evaluated)
    best = min(seen, key=lambda e: e.loss)
    assert report["best_step"] == best.step
    assert report["steps"] == best.step + 6 < 160
    assert [e.best for e in seen[-3:]] == [False] * 3
    assert report["evaluation"]["adapter"]["loss"] == pytest.approx(best.loss, rel=1e-6)
    last = Path(config.output) / "adapter-last"
    ours, theirs = adapter_tensors(report["adapter"]), adapter_tensors(last)
    assert not all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert held_out_loss_of(config, last) == pytest.approx(seen[-1].loss, rel=1e-6)


def held_out_loss_of(config: TrainConfig, adapter: Path) -> float:
    from twofold.recipes.adapters import load_with_adapters
    from twofold.recipes.evaluate import evaluate

    base = load_with_adapters(config.base, [str(adapter)], "float32", "cpu")
    return float(evaluate(base, DataConfig(train=str(config.data.evaluation)))["loss"])


# ---------------------------------------------------------------------------------------------- going on from an adapter


def test_a_run_goes_on_from_an_adapter(config: TrainConfig, tmp_path: Path) -> None:
    first = train(config)
    heard = Heard()
    settings = AdapterSettings(init_from=first["adapter"])
    second = train(replace(config, adapter=settings, output=str(tmp_path / "more")), heard)
    assert open_adapter(Path(second["adapter"])).config.r == 4
    assert heard.of(Step)[0].loss < 0.8 * first["evaluation"]["base"]["loss"]
    assert second["evaluation"]["adapter"]["loss"] < 1.05 * first["evaluation"]["adapter"]["loss"]
    assert second["evaluation"]["base"] == first["evaluation"]["base"]
    start, end = adapter_tensors(first["adapter"]), adapter_tensors(second["adapter"])
    assert not any(torch.equal(start[k], end[k]) for k in start)


def test_settings_that_contradict_the_adapter_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    first = train(changed(config, max_steps=1))
    settings = AdapterSettings(init_from=first["adapter"], r=32, lora_dropout=0.5)
    with pytest.raises(ConfigError, match=r"r is 32 here but 4 there; lora_dropout is 0.5 here but 0.0 there"):
        train(replace(config, adapter=settings, output=str(tmp_path / "more")))


def test_a_run_that_goes_on_writes_down_the_settings_that_hold(config: TrainConfig, tmp_path: Path) -> None:
    first = train(changed(config, max_steps=1))
    settings = AdapterSettings(init_from=first["adapter"])
    more = train(changed(replace(config, adapter=settings, output=str(tmp_path / "more")), max_steps=1))
    written = read_config(Path(more["run"]) / "config.yaml")
    assert written.adapter.r == 4
    assert train(replace(written, output=str(tmp_path / "again")))["steps"] == 1


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_run_goes_on_with_a_as_it_stands(config: TrainConfig, tmp_path: Path, use_dora: bool) -> None:
    """LoRA-FA from an adapter whose A has learned: not one bit of A moves, and B learns on."""
    first = train(replace(config, adapter=replace(config.adapter, use_dora=use_dora)))
    settings = AdapterSettings(init_from=first["adapter"], freeze_a=True)
    second = train(replace(config, adapter=settings, output=str(tmp_path / "more")))
    start, end = adapter_tensors(first["adapter"]), adapter_tensors(second["adapter"])
    assert start.keys() == end.keys()
    for key, tensor in end.items():
        assert torch.equal(tensor, start[key]) == ("lora_A" in key), key
    assert second["parameters"]["trainable"] == sum(t.numel() for k, t in end.items() if "lora_A" not in k)
    assert second["evaluation"]["adapter"]["loss"] < 1.05 * first["evaluation"]["adapter"]["loss"]
    assert second["verification"]["passed"]
    assert read_config(Path(second["run"]) / "config.yaml").adapter.freeze_a


def test_a_cannot_be_frozen_where_the_adapter_goes_beyond_linear_layers(config: TrainConfig, tmp_path: Path) -> None:
    targets = ("q_proj", "embed_tokens")
    first = train(changed(replace(config, adapter=replace(config.adapter, target_modules=targets)), max_steps=1))
    settings = AdapterSettings(init_from=first["adapter"], freeze_a=True)
    with pytest.raises(ConfigError, match=r"freeze_a is defined for linear layers alone.*'model.embed_tokens'"):
        train(replace(config, adapter=settings, output=str(tmp_path / "more")))


@pytest.mark.parametrize("place", ["file", "flag", "file, adapter by flag", "flag, adapter in the file"])
@pytest.mark.parametrize("r", [16, 4])
def test_a_setting_given_by_hand_must_be_the_adapters_even_if_it_is_the_default(
    config: TrainConfig, cli: WarmCli, tmp_path: Path, place: str, r: int
) -> None:
    """16 is the default of r, 4 the adapter's."""
    adapter = train(changed(config, max_steps=1))["adapter"]
    in_file = {"init_from": adapter} if place in ("file", "flag, adapter in the file") else {}
    in_file |= {"r": r} if place.startswith("file") else {}
    by_flag = ("--adapter.r", r) if place.startswith("flag") else ()
    by_flag += ("--adapter.init-from", adapter) if "init_from" not in in_file else ()
    again = replace(config, output=str(tmp_path / "more"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(as_dict(again) | {"adapter": in_file}))
    found = cli("train", path, *by_flag, "--dry-run", "--json")
    if r == 4:
        assert found.json()["parameters"]["modules"] == 14
    else:
        assert "r is 16 here but 4 there; leave these out" in found.refusal()


def test_an_adapter_of_another_base_is_refused_unless_meant(
    config: TrainConfig, other_base: Path, tmp_path: Path
) -> None:
    first = train(changed(config, max_steps=1))
    settings = AdapterSettings(init_from=first["adapter"])
    foreign = replace(config, base=str(other_base), adapter=settings, output=str(tmp_path / "foreign"))
    with pytest.raises(ForeignBaseError, match=r"other weights .*--allow-foreign-base"):
        train(changed(foreign, max_steps=1))
    meant = replace(foreign, allow_foreign_base=True, output=str(tmp_path / "meant"))
    report = train(changed(meant, max_steps=1))
    fingerprint = open_adapter(Path(report["adapter"])).provenance
    assert fingerprint is not None
    assert fingerprint.base == load_base(str(other_base), "float32", "cpu").fingerprint.as_json()
