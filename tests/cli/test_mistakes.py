"""Mistakes on the command line: one sentence, and the code that scripts rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_base import write_jsonl
from tiny_runs import edited
from warm_cli import WarmCli, cold

pytest_plugins = ("tiny_fixtures",)


def test_a_misspelt_verb(cli: WarmCli) -> None:
    assert "no verb 'trian'; did you mean 'train'" in cli("trian").refusal()
    assert cold("trian").refusal() == cli("trian").refusal()


def test_a_misspelt_key_and_a_wrong_type_are_told_together(cli: WarmCli, config: Path, tmp_path: Path) -> None:
    wrong = edited(config, tmp_path, training__learning_rat=1, adapter__r="many")
    said = cli("train", wrong).refusal()
    assert "unknown key 'training.learning_rat'; did you mean 'learning_rate'" in said
    assert "'adapter.r' is 'many' but should be a whole number" in said
    assert not (tmp_path / "run").exists()


def test_a_misspelt_target(cli: WarmCli, config: Path, tmp_path: Path) -> None:
    said = cli("train", edited(config, tmp_path, adapter__target_modules=["q_porj"])).refusal()
    assert "q_porj" in said
    assert "q_proj" in said
    assert not (tmp_path / "run").exists()


def test_a_configuration_that_is_not_there_or_not_yaml(cli: WarmCli, tmp_path: Path) -> None:
    assert "No such file" in cli("train", tmp_path / "none.yaml").refusal()
    (tmp_path / "odd.yaml").write_text("base: [unclosed")
    assert "is not valid YAML" in cli("train", tmp_path / "odd.yaml").refusal()


@pytest.mark.parametrize("verb", ["train", "preview"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no data at"),
        ("", "the file is empty"),
        ('{"messages": [{"role": "user", "content": "a"}\n', "data.jsonl, line 1: not valid JSON"),
        ('{"question": "a", "answer": "b"}\n', "has the columns 'question', 'answer', which fit no known format"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "nothing in data.jsonl is supervised"),
    ],
    ids=["missing", "empty", "broken", "columns", "unsupervised"],
)
def test_data_that_cannot_be_used(
    cli: WarmCli, config: Path, tmp_path: Path, verb: str, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "data.jsonl").write_text(content)
    assert said in cli(verb, edited(config, tmp_path, data__train=str(tmp_path / "data.jsonl"))).refusal()
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_not_there(cli: WarmCli, tmp_path: Path) -> None:
    assert "did you mean 'smollm2-135m-instruct'" in cli("plan", "--base", "smollm2-135m-instrukt").refusal()
    (tmp_path / "folder").mkdir()
    assert "has no config.json" in cli("generate", "--base", tmp_path / "folder", "hello").refusal()


def test_a_base_that_the_hub_does_not_give(cli: WarmCli, llama_base: Path, adapter: Path, tmp_path: Path) -> None:
    said = "cannot find the files of no/such-base: "
    assert said in cli("inspect", adapter, "--base", "no/such-base").refusal()
    asked = ("extract", "--r", 2, "-o", tmp_path / "out")
    assert said in cli(*asked, "--base", "no/such-base", "--tuned", llama_base).refusal()
    assert said in cli(*asked, "--base", llama_base, "--tuned", "no/such-base").refusal()


def test_an_adapter_of_another_base(cli: WarmCli, other_base: Path, adapter: Path, tmp_path: Path) -> None:
    flags = ("--base", other_base, "--adapter", adapter, "--dtype", "float32")
    assert "--allow-foreign-base" in cli("generate", *flags, "hello").refusal()
    assert "other weights" in cli("merge", *flags, "-o", tmp_path / "merged").refusal()
    assert not (tmp_path / "merged").exists()
    found = cli("generate", *flags, "hello", "--allow-foreign-base", "--max-new-tokens", 2)
    assert found.code == 0, found.stderr


def test_adapters_that_cannot_be_read(cli: WarmCli, llama_base: Path, broken: Path, tmp_path: Path) -> None:
    tensors = broken / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"not tensors at all"):
        tensors.write_bytes(damaged)
        assert "is damaged or not a safetensors file" in cli("inspect", broken).refusal()
    assert "is damaged" in cli("generate", "--base", llama_base, "--adapter", broken, "hello").refusal()
    tensors.rename(broken / "adapter_model.bin")
    assert "is a pickle, which can run code" in cli("inspect", broken).refusal()
    (broken / "adapter_config.json").write_text("{")
    tensors.write_bytes(whole)
    assert "is not valid JSON" in cli("inspect", broken).refusal()
    assert "no adapter folder at" in cli("inspect", tmp_path / "nowhere").refusal()


def test_an_adapter_that_is_not_there_is_told_before_the_base_is_loaded(
    cli: WarmCli, llama_base: Path, tmp_path: Path
) -> None:
    found = cli("generate", "--base", llama_base, "--adapter", tmp_path / "nowhere", "hello")
    assert "no adapter folder at" in found.refusal()
    assert "loading" not in found.stderr


def test_an_adapter_of_a_task_that_is_not_known(cli: WarmCli, llama_base: Path, broken: Path) -> None:
    ours = json.loads((broken / "twofold.json").read_text())
    ours["training"]["task"] = "token-cls"
    (broken / "twofold.json").write_text(json.dumps(ours))
    said = cli("generate", "--base", llama_base, "--adapter", broken, "hello").refusal()
    assert "the task 'token-cls', which is none of causal-lm, " in said


def test_an_adapter_whose_tensors_do_not_fit(cli: WarmCli, llama_base: Path, broken: Path) -> None:
    path = broken / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 5}))
    said = cli("generate", "--base", llama_base, "--adapter", broken, "hello").refusal()
    assert "has rank 4 in the tensors but 5 by the config" in said


def test_a_scale_that_is_no_number(cli: WarmCli, llama_base: Path, adapter: Path) -> None:
    said = cli("generate", "--base", llama_base, "--adapter", f"{adapter}:loud", "hello").refusal()
    assert "the part after ':' must be a finite number" in said


def test_merging_nothing(cli: WarmCli, llama_base: Path, tmp_path: Path) -> None:
    assert "name at least one adapter" in cli("merge", "--base", llama_base, "-o", tmp_path / "merged").refusal()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "--trainig.seed", 1), "unknown flag '--trainig.seed'; did you mean '--training.seed'"),
        (("train", "--data.train", "x", "--adapter.lora_alfa=3"), "did you mean '--adapter.lora-alpha'"),
        (("train", "--data.train", "x", "--verify", "no"), "unknown flag '--verify'; did you mean '--no-verify'?"),
        (("train", "--data.train", "x", "--resum"), "unknown flag '--resum'; did you mean '--resume'?"),
        (("plan", "--resume"), "unknown flag '--resume'; see twofold plan --help"),
        (("plan", "stray"), "unexpected argument 'stray'; see twofold plan --help"),
        (("plan", "--r", "four"), "--r: 'four' is not a whole number; see twofold plan --help"),
        (("plan", "--r"), "--r needs a value"),
        (("plan", "--dtype", "int3"), "--dtype: 'int3' is none of 'float32', 'bfloat16', 'float16'"),
        (
            ("train", "--data.train", "x", "--training.learning-rate", "fast"),
            "--training.learning-rate: 'fast' is not a n",
        ),
        (
            ("train", "--data.train", "x", "--training.max-steps", "x"),
            "--training.max-steps: 'x' does not fit {None}|INT",
        ),
        (("train", "--data.train", "x", "--adapter.rank-pattern", "a"), "give pairs of a name and a number"),
        (("train", "--adapter.r", 2), "--data.train is missing: JSONL, JSON, CSV or Parquet"),
        (("merge",), "--output is missing: the folder to write; see twofold merge --help"),
        (("generate",), "an argument is missing: what to answer; see twofold generate --help"),
        (("generate", "--adapter", "mine"), "an argument is missing: what to answer; see twofold generate --help"),
        (("generate", "--adapter"), "--adapter needs a value"),
        (("merge", "--adapter", "mine", "yours"), "unexpected argument 'yours'"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_a_wrong_flag_is_one_sentence(cli: WarmCli, arguments: tuple[Any, ...], said: str) -> None:
    found = cli(*arguments).refusal()
    assert said in found
    assert not set("│╭╰─") & set(found)


@pytest.mark.parametrize("arguments", ["--help", "base list --json", "train --help", "nonsense"])
@pytest.mark.parametrize("buffered", [True, False])
def test_nobody_reading_the_output_is_no_error(arguments: str, buffered: bool) -> None:
    """As in `twofold --help | head -1`, where the reader has gone: here it goes before the first line."""
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "twofold", *arguments.split()]
    found = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(write)
    if arguments == "nonsense":
        assert (found.returncode, "no verb 'nonsense'" in found.stderr) == (2, True)
    else:
        assert (found.returncode, found.stderr) == (141, "")


UNREAD = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.close(w)"


@pytest.mark.parametrize("document", [(), ("--json",)])
def test_nobody_reading_a_table_is_no_error(cli: WarmCli, adapter: Path, document: tuple[str, ...]) -> None:
    found = cli("inspect", adapter, *document, setup=UNREAD)
    assert (found.code, found.stderr) == (141, "")


ASCII = "import sys; sys.stdout.reconfigure(encoding='ascii')"


def test_a_terminal_that_is_not_utf8_gets_what_it_can_show(cli: WarmCli, llama_base: Path, adapter: Path) -> None:
    found = cli("inspect", adapter, setup=ASCII)
    assert (found.code, found.stderr) == (0, "")
    assert found.stdout == cli("inspect", adapter).stdout.replace("…", "?")
    flags = ("--base", llama_base, "--max-new-tokens", 1, "--json")
    assert cli("generate", "blå kopp …", *flags, setup=ASCII).json()["prompt"] == "blå kopp …"
    for mistaken in (("generate",), ("merge",), ("plan", "--r", "four"), ("plan", "--dtype", "int3")):
        assert cli(*mistaken, setup=ASCII).refusal() == cli(*mistaken).refusal()


def test_only_debug_shows_a_traceback(cli: WarmCli, tmp_path: Path) -> None:
    found = cli("inspect", tmp_path / "nowhere", "--debug")
    assert "Traceback" in found.stderr
    assert "AdapterFileError" in found.stderr
    assert "Traceback" not in cli("inspect", tmp_path / "nowhere").stderr


def test_a_training_that_cannot_go_on_has_code_one(cli: WarmCli, config: Path, tmp_path: Path) -> None:
    flags = ("--output", tmp_path / "run", "--training.learning-rate", "1e30", "--training.warmup", 0)
    found = cli("train", config, *flags, "--training.schedule", "constant")
    assert found.code == 1
    assert "try a lower learning rate" in found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr


def test_an_empty_list_of_rows_is_refused_by_eval(cli: WarmCli, llama_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": "only text"}])
    flags = ("--base", llama_base, "--dtype", "float32", "--data", data)
    assert cli("eval", *flags, "--json").json()["examples"] == 1
    assert "plain text, which has no answers to match" in cli("eval", *flags, "--generate").refusal()


def test_a_configuration_behind_a_flag_is_not_taken_for_its_value(cli: WarmCli, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for flags in (["--full", file], ["--adapter.r", "4", file]):
        assert f"before the flags: twofold train {file} {flags[0]}" in cli("train", *flags).refusal()
