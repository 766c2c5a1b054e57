"""`train --full`: against a plain loop of transformers, killed and resumed, and refused where it makes no sense."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import KILL_AT_STEP, Heard, changed
from transformers import AutoModelForCausalLM
from warm_cli import WarmCli, cold

from twofold.base.load import load_base
from twofold.config import as_dict
from twofold.data.batches import step_indices
from twofold.errors import ConfigError
from twofold.events import Step
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.train import dry_run, train
from twofold.training.optim import learning_rate

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def full(config: TrainConfig) -> TrainConfig:
    """Eight steps over all parameters, at a rate that suits them."""
    return changed(replace(config, full=True, adapter=AdapterSettings()), learning_rate=3e-3, epochs=2)


def plain_loop(config: TrainConfig, train_file: Path, held_out: Path) -> tuple[list[float], float, Any]:
    """The same training as anybody would write it: one example at a time through the model, AdamW over its parameters."""
    base = load_base(config.base, "float32", "cpu")
    model = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32).train()
    examples, others = ([_example(base, line) for line in f.read_text().splitlines()] for f in (train_file, held_out))
    optimise = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses = []
    per_epoch = -(-len(examples) // config.training.batch_size)
    steps = per_epoch * config.training.epochs
    for step in range(steps):
        chosen = [
            examples[i] for i in step_indices(len(examples), config.training.batch_size, config.training.seed, step)
        ]
        for group in optimise.param_groups:
            group["lr"] = learning_rate(config.training, step, steps)
        losses.append(_mean_loss(model, chosen))
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clip)
        optimise.step()
        optimise.zero_grad()
    with torch.no_grad():
        return [float(x) for x in losses], float(_mean_loss(model.eval(), others)), model


def _example(base: Any, line: str) -> tuple[torch.Tensor, torch.Tensor]:
    (example,) = base.renderer.chat(json.loads(line)["messages"])
    ids = torch.tensor([example.token_ids])
    return ids, torch.where(torch.tensor([example.supervised]), ids, -100)


def _mean_loss(model: Any, examples: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    counts = [int((labels[:, 1:] != -100).sum()) for _, labels in examples]
    sums = [model(input_ids=i, labels=y).loss * n for (i, y), n in zip(examples, counts, strict=True)]
    return torch.stack(sums).sum() / sum(counts)


@pytest.mark.parametrize("base", ["llama_base", "tied_base"])
def test_losses_and_weights_are_those_of_a_plain_loop(
    full: TrainConfig, base: str, train_file: Path, held_out_file: Path, request: pytest.FixtureRequest
) -> None:
    full, heard = replace(full, base=str(request.getfixturevalue(base))), Heard()
    report = train(full, heard)
    losses, held_out, model = plain_loop(full, train_file, held_out_file)
    assert [s.loss for s in heard.of(Step)] == pytest.approx(losses, rel=2e-5)
    assert losses[-1] < 0.7 * losses[0]
    assert report["evaluation"]["full"]["loss"] == pytest.approx(held_out, rel=2e-5)
    saved = AutoModelForCausalLM.from_pretrained(report["model"], dtype=torch.float32)
    for (name, ours), theirs in zip(saved.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), name


def test_a_full_run_says_what_it_is(full: TrainConfig) -> None:
    report = train(full)
    run = Path(full.output)
    assert report["adapter"] is None
    assert report["evaluation"]["adapter"] is report["evaluation"]["merged"] is None
    assert report["base_unchanged"] is report["verification"] is None
    assert report["parameters"]["fraction"] == 1
    assert report["predicted"]["memory"]["gradients"] == 4 * report["parameters"]["base"]
    assert report["predicted"]["memory"]["optimizer"] == 8 * report["parameters"]["base"]
    assert (run / "model" / "model.safetensors").is_file()
    assert not (run / "adapter").exists()
    assert "Full" in (run / "report.html").read_text()


def test_it_stands_beside_adapters_of_the_same_data(full: TrainConfig, config: TrainConfig, tmp_path: Path) -> None:
    train(changed(replace(config, output=str(tmp_path / "lora"), verify=False), max_steps=2))
    report = train(replace(full, output=str(tmp_path / "full")))
    rows = {row["run"]: row for row in report["same_data"]}
    assert rows["full"]["settings"]["adapter.full"] is True
    assert rows["full"]["r"] is None
    assert rows["full"]["adapter_loss"] == report["evaluation"]["full"]["loss"]
    assert rows["lora"]["r"] == 4


def test_the_best_by_evaluation_is_kept_and_the_last_beside_it(full: TrainConfig) -> None:
    report = train(changed(full, epochs=6, learning_rate=0.1, schedule="constant", evaluate_every=1))
    assert report["best_step"] < report["steps"], "nothing was kept apart, so nothing is shown"
    best, last = (load_base(str(Path(report["run"]) / n), "float32", "cpu").model for n in ("model", "model-last"))
    assert not torch.equal(best.lm_head.weight, last.lm_head.weight)


def test_sixteen_bits_learn_by_float32_values(full: TrainConfig) -> None:
    """At a small rate, steps on 16-bit weights alone would round away; with wide values they do as well as float32."""
    gentle = changed(full, learning_rate=3e-4, epochs=6)
    wide = train(replace(gentle, output=f"{full.output}-wide"))
    narrow = train(replace(gentle, dtype="bfloat16"))
    before, after = wide["evaluation"]["base"]["loss"], wide["evaluation"]["full"]["loss"]
    assert narrow["evaluation"]["full"]["loss"] == pytest.approx(after, abs=0.05 * (before - after))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_killed_and_resumed_it_has_the_same_bits(cli: WarmCli, full: TrainConfig, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "config.yaml"
    settings = as_dict(changed(replace(full, dtype=dtype), checkpoint_every=3, micro_batch_size=2, weight_decay=0.1))
    path.write_text(yaml.safe_dump(settings))
    whole, run = tmp_path / "whole", tmp_path / "killed"
    assert cold("train", path, "--output", whole).code == 0
    killed = cli("train", path, "--output", run, setup=KILL_AT_STEP.format(step=5))
    assert killed.code == -signal.SIGKILL
    assert cli("train", path, "--output", run, "--resume").code == 0
    ours, theirs = ((r / "model" / "model.safetensors").read_bytes() for r in (run, whole))
    assert ours == theirs
    assert cli("train", path, "--output", run, "--resume").refusal().endswith(f"its model is in {run / 'model'}")


def test_the_flag_is_the_key(cli: WarmCli, config: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(as_dict(replace(config, adapter=AdapterSettings()))))
    found = cli("train", path, "--full", "--dry-run", "--json").json()
    assert found["parameters"]["fraction"] == 1
    assert "full fine-tuning" in found["path"]


def test_what_it_cannot_go_with_is_named_all_at_once(config: TrainConfig) -> None:
    adapter = AdapterSettings(r=8, use_dora=True)
    with pytest.raises(
        ConfigError, match=r"adapter\.r and adapter\.use_dora and quantization: nf4 cannot go with full"
    ):
        replace(config, full=True, quantization="nf4", adapter=adapter)
    with pytest.raises(
        ConfigError, match=r"training\.parallel: shard and training\.spectrum_every cannot go with full"
    ):
        changed(replace(config, full=True, adapter=AdapterSettings()), parallel="shard", spectrum_every=1)


def test_looking_first_writes_nothing(full: TrainConfig) -> None:
    found = dry_run(full)
    assert found.parameters.trainable == found.parameters.base
    assert not Path(full.output).exists()
