"""`train`: runs that cannot go on say why, and leave nothing half made."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import Heard, changed
from warm_cli import WarmCli

from twofold.data.examples import DataConfig
from twofold.errors import AdapterFileError, ConfigError, NonFiniteLossError, RunError
from twofold.events import Checkpointed, Spectrum
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.train import train
from twofold.tensorfile import TensorFile

pytest_plugins = ("tiny_fixtures",)


def test_a_loss_that_is_not_finite_stops_before_the_adapter_is_spoiled(config: TrainConfig, llama_base: Path) -> None:
    heard = Heard()
    with pytest.raises(NonFiniteLossError) as caught:
        train(changed(config, learning_rate=1e30, checkpoint_every=1, warmup=0.0, schedule="constant"), heard)
    newest = heard.of(Checkpointed)[-1]
    said = str(caught.value)
    assert re.match(rf"step {newest.step + 1} gave (loss|gradient norm) (nan|inf)", said)
    assert newest.path in said
    assert "lower learning rate" in said
    kept = TensorFile(Path(config.output) / "checkpoints" / newest.path / "state.safetensors")
    assert all(torch.isfinite(kept.read(k)).all() for k in kept.shapes if k.startswith("parameter."))
    assert not (Path(config.output) / "adapter").exists()
    assert not (Path(config.output) / "report.json").exists()


def test_spectra_of_what_is_not_finite_are_left_out(config: TrainConfig) -> None:
    """The step after says what is wrong."""
    heard = Heard()
    flung = {"learning_rate": 1e38, "gradient_clip": 0.0, "warmup": 0.0, "schedule": "constant"}
    with pytest.raises(NonFiniteLossError, match=r"step \d+ gave (loss|gradient norm) (nan|inf)"):
        train(changed(config, spectrum_every=1, **flung), heard)
    for event in heard.of(Spectrum):
        assert all(math.isfinite(value) for values in event.modules.values() for value in values)


def test_poisoned_weights_are_told_at_the_first_step(
    config: TrainConfig, llama_base: Path, tmp_path: Path, train_file: Path
) -> None:
    import shutil

    poisoned = Path(shutil.copytree(llama_base, tmp_path / "poisoned"))
    weights = load_file(poisoned / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    config = replace(config, base=str(poisoned), data=DataConfig(train=str(train_file)))
    with pytest.raises(NonFiniteLossError, match=r"step 1 gave loss nan.*no checkpoint was due before"):
        train(config)


def test_a_damaged_adapter_to_go_on_from_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    first = train(changed(config, max_steps=1))
    file = Path(first["adapter"]) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterFileError, match="damaged"):
        train(replace(config, adapter=AdapterSettings(init_from=first["adapter"]), output=str(tmp_path / "more")))


FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"
FULL_DISK += "; import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"


@pytest.mark.parametrize("every", ["1", "None"], ids=["checkpoint", "adapter"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    cli: WarmCli, llama_base: Path, train_file: Path, tmp_path: Path, every: str
) -> None:
    """The limit lets the small files through and not the tensors."""
    run = tmp_path / "run"
    flags = ("--base", llama_base, "--data.train", train_file, "--output", run, "--adapter.r", 16)
    training = ("--training.max-steps", 2, "--training.checkpoint-every", every, "--dtype", "float32")
    found = cli("train", *flags, *training, setup=FULL_DISK.format(40_000))
    last = found.stderr.splitlines()[-1]
    assert found.code == 2, found.stderr
    assert last.startswith(
        f"twofold: cannot write {run / ('adapter' if every == 'None' else 'checkpoints/step-000001')}"
    )
    assert "free space or choose another output folder" in last
    assert "Traceback" not in found.stderr
    written = {str(p.relative_to(run)) for p in run.rglob("*")}
    assert written - {"checkpoints"} == {"config.yaml", "preflight.json", "events.jsonl"}


def test_an_output_that_cannot_be_a_folder_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write"):
        train(replace(config, output=str(tmp_path / "file" / "run")))
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_mistake_found_before_the_run_leaves_no_folder_that_blocks_the_next(config: TrainConfig) -> None:
    with pytest.raises(Exception, match="no data at"):
        train(replace(config, data=DataConfig(train="nowhere.jsonl")))
    assert train(changed(config, max_steps=1))["steps"] == 1


def test_a_mistake_found_when_the_adapter_is_attached_leaves_none_either(config: TrainConfig) -> None:
    """That is after the pre-flight was written, and before anything was learned."""
    with pytest.raises(ConfigError, match="loftq"):
        train(replace(config, adapter=replace(config.adapter, init_lora_weights="loftq")))
    assert train(changed(config, max_steps=1))["steps"] == 1


def test_evaluations_without_held_out_data_are_refused(config: TrainConfig) -> None:
    without = replace(config, data=DataConfig(train=config.data.train))
    with pytest.raises(ConfigError, match=r"training\.evaluate_every and training\.early_stopping .* data\.evaluation"):
        changed(without, evaluate_every=2, early_stopping=3)


def test_float16_is_refused_for_training_and_served(config: TrainConfig, cli: WarmCli, held_out_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"float16 cannot train: .*use bfloat16 or float32"):
        replace(config, dtype="float16")
    flags = ("--base", config.base, "--dtype", "float16")
    assert "float16 cannot train" in cli("train", *flags, "--data.train", config.data.train).refusal()
    assert cli("eval", *flags, "--data", held_out_file, "--json").json()["loss"] > 0
