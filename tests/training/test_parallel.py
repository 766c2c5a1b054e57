"""Several processes train what one does: same losses, one run folder, and a run that outlives any of them."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_base import chats, write_jsonl
from warm_cli import Finished, WarmCli, torchrun

pytest_plugins = ("tiny_fixtures",)

STEPS = 12
TRAINING = {
    "batch_size": 4,  # 23 examples: the last step of an epoch has three
    "micro_batch_size": 1,
    "epochs": 2,
    "learning_rate": 0.01,
    "checkpoint_every": 3,
    "evaluate_every": 5,
}
AT_STEP = """
import os, signal, twofold.training.loop as loop
real = loop.learning_rate
def rate(config, step, steps):
    if step == {step} and os.environ["RANK"] == "{rank}":
        {deed}
    return real(config, step, steps)
loop.learning_rate = rate
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tied_base: Path, train_file: Path, held_out_file: Path) -> Path:
    path = tmp_path_factory.mktemp("parallel") / "config.yaml"
    settings = {
        "base": str(tied_base),
        "data": {"train": str(train_file), "evaluation": str(held_out_file)},
        "adapter": {"r": 4},
        "training": TRAINING,
        "dtype": "float32",
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def alone(config: Path, cli: WarmCli) -> Path:
    """The run of a single process, without a word of torchrun in its environment."""
    run = config.parent / "alone"
    assert cli("train", config, "--output", run).code == 0
    return run


def recorded(run: Path, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [e for e in events if e["event"] == kind]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_training(run: Path, reference: Path) -> None:
    """The same losses, step by step, to 1e-5; every step written once."""
    ours, theirs = recorded(run, "step"), recorded(reference, "step")
    assert [e["step"] for e in ours] == [e["step"] for e in theirs] == list(range(1, len(theirs) + 1))
    assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in theirs], abs=1e-5)
    assert [e["gradient_norm"] for e in ours] == pytest.approx([e["gradient_norm"] for e in theirs], rel=1e-5)
    for key in ("tokens", "supervised_tokens", "epoch"):
        assert [e[key] for e in ours] == [e[key] for e in theirs], key
    held_out = [[e["loss"] for e in recorded(r, "evaluated")] for r in (run, reference)]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-5)
    report, expected = (json.loads((r / "report.json").read_text()) for r in (run, reference))
    for who in ("base", "adapter"):
        assert report["evaluation"][who] == pytest.approx(expected["evaluation"][who], abs=1e-5)
    assert report["base_unchanged"]
    for name, tensor in adapter(reference).items():
        torch.testing.assert_close(adapter(run)[name], tensor, atol=1e-4, rtol=1e-3)


def written(run: Path) -> set[str]:
    return {str(p.relative_to(run)) for p in run.rglob("*")}


def all_well(ended: list[Finished]) -> None:
    assert [f.code for f in ended] == [0] * len(ended), "\n".join(f.stderr for f in ended)
    assert not any(f.stdout or f.stderr for f in ended[1:]), "only rank 0 speaks"


def sentences(*said: str) -> list[str]:
    return [line for text in said for line in text.splitlines() if line.startswith("twofold: ")]


# ---------------------------------------------------------------------------------------------- the same training


def test_torchrun_trains_what_one_process_does(config: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = torchrun(2, "-m", "twofold", "train", config, "--output", run, "--json")
    assert found.code == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["processes"] == 2
    assert report["verification"]["passed"]
    assert written(run) == written(alone)
    assert_same_training(run, alone)


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (3, ()),
        (2, ("--training.parallel", "shard")),
        (3, ("--training.parallel", "shard", "--training.gradient-checkpointing")),
    ],
    ids=["data-3", "shard-2", "shard-3-recomputed"],
)
def test_any_number_of_processes_and_a_sharded_base_give_the_same_losses(
    config: Path, alone: Path, cli: WarmCli, tmp_path: Path, size: int, flags: tuple[str, ...]
) -> None:
    """Four examples among three processes: two of them idle in the second micro-batch. Input and output embedding are one."""
    run = tmp_path / "run"
    all_well(cli.world(size, "train", config, "--output", run, *flags))
    assert written(run) == written(alone)
    assert_same_training(run, alone)
    assert (json.loads((run / "report.json").read_text())["verification"] is None) == ("shard" in flags)
    assert ("sharded" in str(recorded(run, "message"))) == ("shard" in flags)


def test_an_adapted_head_and_embedding_train_over_a_sharded_base(
    config: Path, llama_base: Path, cli: WarmCli, tmp_path: Path
) -> None:
    everything = ("--base", llama_base, "--adapter.target-modules", "embed_tokens", "lm_head", "q_proj", "up_proj")
    assert cli("train", config, "--output", tmp_path / "alone", *everything).code == 0
    shard = ("--training.parallel", "shard")
    all_well(cli.world(2, "train", config, "--output", tmp_path / "run", *everything, *shard))
    assert_same_training(tmp_path / "run", tmp_path / "alone")


OTHER_SIGNS = """
import os, twofold.recipes.train as recipe
real = recipe.started
def started(*a):
    lora, factors = real(*a)
    return lora, {n: (-A, -B) for n, (A, B) in factors.items()} if os.environ["RANK"] == "1" else factors
recipe.started = started
"""


def test_processes_whose_machines_decompose_with_other_signs_have_one_start(
    config: Path, cli: WarmCli, tmp_path: Path
) -> None:
    flags = ("--adapter.init-lora-weights", "lora_ga", "--adapter.freeze-a", "--training.max-steps", 4)
    assert cli("train", config, "--output", tmp_path / "alone", *flags).code == 0
    all_well(cli.world(2, "train", config, "--output", tmp_path / "run", *flags, setup=OTHER_SIGNS))
    assert_same_training(tmp_path / "run", tmp_path / "alone")


def test_a_base_in_bfloat16_is_sharded_under_factors_in_float32(config: Path, cli: WarmCli, tmp_path: Path) -> None:
    """Sums of bfloat16 differ by their order, so the losses are only near."""
    flags = ("--dtype", "bfloat16", "--training.max-steps", 4)
    assert cli("train", config, "--output", tmp_path / "alone", *flags).code == 0
    all_well(cli.world(2, "train", config, "--output", tmp_path / "run", *flags, "--training.parallel", "shard"))
    ours, theirs = ([e["loss"] for e in recorded(tmp_path / r, "step")] for r in ("run", "alone"))
    assert ours == pytest.approx(theirs, rel=0.02)
    assert {t.dtype for t in adapter(tmp_path / "run").values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------- a process that dies


def test_torchrun_says_once_that_a_process_was_killed(config: Path, alone: Path, cli: WarmCli, tmp_path: Path) -> None:
    run, script = tmp_path / "run", tmp_path / "killed.py"
    start = "import sys\nfrom twofold.cli.main import main\nsys.exit(main())\n"
    script.write_text(AT_STEP.format(step=8, rank=1, deed=KILLED) + start)
    found = torchrun(2, script, "train", config, "--output", run, PYTHONPATH=os.pathsep.join(sys.path))
    assert found.code == 1
    (said,) = sentences(found.stdout, found.stderr)
    assert "another process of this training ended" in said
    assert "--resume goes on from the newest" in said
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == ["step-000003", "step-000006"]
    assert not (run / "adapter").exists()
    all_well(cli.world(3, "train", config, "--output", run, "--resume"))
    assert_same_training(run, alone)
    assert "2 processes wrote step-000006 and 3 go on from it" in str(recorded(run, "message"))


@pytest.mark.slow
def test_torchrun_restarts_a_run_where_it_was(config: Path, alone: Path, tmp_path: Path) -> None:
    run, script = tmp_path / "run", tmp_path / "killed.py"
    once = f"os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and {KILLED}"
    start = "import sys\nfrom twofold.cli.main import main\nsys.exit(main())\n"
    script.write_text(AT_STEP.format(step=8, rank=1, deed=once) + start)
    path = os.pathsep.join(sys.path)
    found = torchrun(2, "--max-restarts", 1, script, "train", config, "--output", run, PYTHONPATH=path)
    assert found.code == 0, found.stderr
    assert_same_training(run, alone)


def test_a_sharded_run_whose_writing_process_was_killed_goes_on_in_one(
    config: Path, alone: Path, cli: WarmCli, tmp_path: Path
) -> None:
    run, kill = tmp_path / "run", AT_STEP.format(step=8, rank=0, deed=KILLED)
    ended = cli.world(3, "train", config, "--output", run, "--training.parallel", "shard", setup=kill)
    assert [f.code for f in ended] == [-signal.SIGKILL, 1, 1]
    assert len(sentences(*(f.stderr for f in ended))) == 1
    all_well([cli("train", config, "--output", run, "--resume")])
    assert_same_training(run, alone)


def test_resumed_by_as_many_processes_it_has_the_same_bits_dropout_included(
    config: Path, cli: WarmCli, tmp_path: Path
) -> None:
    drop = ("--adapter.lora-dropout", 0.2)
    all_well(cli.world(2, "train", config, "--output", tmp_path / "whole", *drop))
    kill = AT_STEP.format(step=7, rank=1, deed=KILLED)
    codes = [f.code for f in cli.world(2, "train", config, "--output", tmp_path / "run", *drop, setup=kill)]
    assert codes == [1, -signal.SIGKILL]
    all_well(cli.world(2, "train", config, "--output", tmp_path / "run", "--resume", *drop))
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    ours, theirs = ([(e["loss"], e["gradient_norm"]) for e in recorded(tmp_path / r, "step")] for r in ("run", "whole"))
    assert ours == theirs


def test_processes_drop_different_values(config: Path, cli: WarmCli, tmp_path: Path) -> None:
    """Two processes with the same example would with the same masks learn what one of them learns alone."""
    flags = ("--training.batch-size", 2, "--training.epochs", 3, "--adapter.lora-dropout", 0.5)
    third = []
    for copies in (1, 2):
        data, run = write_jsonl(tmp_path / f"{copies}.jsonl", chats(1) * copies), tmp_path / f"run{copies}"
        all_well(cli.world(2, "train", config, "--output", run, "--data.train", data, *flags))
        third.append(recorded(run, "step")[2]["loss"])
    assert abs(third[0] - third[1]) > 1e-4


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (("--data.train", "nowhere.jsonl"), 2, "no data at nowhere.jsonl"),
        (
            ("--training.parallel", "shard", "--adapter.bias", "all", "--adapter.trainable-token-indices", 5, 9),
            2,
            "adapter.bias and adapter.trainable_token_indices cannot be trained over a sharded base",
        ),
        (("--device", "cuda"), 2, "device 'cuda' is not to be had"),
        (("--training.learning-rate", "1e30", "--training.warmup", "0"), 1, "gave "),
    ],
    ids=["data", "shard", "device", "nan"],
)
def test_a_mistake_of_all_is_one_sentence(
    config: Path, cli: WarmCli, tmp_path: Path, flags: tuple[str, ...], code: int, named: str
) -> None:
    ended = cli.world(2, "train", config, "--output", tmp_path / "run", *flags)
    assert {f.code for f in ended} == {code}
    (said,) = sentences(*(f.stderr for f in ended))
    assert named in said
    assert not any("Traceback" in f.stderr for f in ended)
    assert (tmp_path / "run").exists() == (code == 1), "a configuration that can be mended leaves no folder in the way"


def test_a_mistake_of_one_process_stops_all_and_is_said_by_it(config: Path, cli: WarmCli, tmp_path: Path) -> None:
    broken = AT_STEP.format(step=2, rank=1, deed="raise OSError('the cable is out')")
    ended = cli.world(2, "train", config, "--output", tmp_path / "run", setup=broken)
    assert [f.code for f in ended] == [1, 1]
    assert "the cable is out" in sentences(ended[1].stderr)[0]
    assert not sentences(ended[0].stderr)


def test_processes_that_read_other_data_are_refused(config: Path, cli: WarmCli, tmp_path: Path) -> None:
    """As machines do whose files under one name are not the same."""
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", chats(8, start=rank))
    setup = f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])"
    flags = ("--data.train", "train.jsonl", "--output", tmp_path / "run")
    ended = cli.world(2, "train", config, *flags, setup=setup)
    assert {f.code for f in ended} == {2}
    (said,) = sentences(*(f.stderr for f in ended))
    assert "read different things under the same name (train)" in said


# ---------------------------------------------------------------------------------------------- streams


def test_a_streamed_data_set_is_the_same_training_however_many_share_it_and_wherever_it_stops(
    config: Path, cli: WarmCli, tmp_path: Path
) -> None:
    """Two of the 23 rows are too long: those of all passes and processes are counted, before and after the stop."""
    stream = ("--data.streaming", "--training.max-steps", 12, "--data.max-length", 34)
    assert cli("train", config, "--output", tmp_path / "alone", *stream).code == 0
    kill = AT_STEP.format(step=7, rank=0, deed=KILLED)
    codes = [f.code for f in cli.world(2, "train", config, "--output", tmp_path / "run", *stream, setup=kill)]
    assert codes == [-signal.SIGKILL, 1]
    all_well(cli.world(3, "train", config, "--output", tmp_path / "run", "--resume", *stream))
    assert_same_training(tmp_path / "run", tmp_path / "alone")
    left_out = [recorded(tmp_path / run, "warned")[-1]["text"] for run in ("run", "alone")]
    assert left_out[0] == left_out[1]
    assert int(left_out[0].split()[0]) in (4, 5, 6), "in two passes and two rows"
    assert recorded(tmp_path / "run", "step")[-1]["epoch"] == 2, "48 rows are two passes over 23, and two rows"
