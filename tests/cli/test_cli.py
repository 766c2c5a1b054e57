"""The command line: one document on stdout, one sentence for a mistake, and the codes that scripts rely on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml
from tiny_base import write_jsonl
from transformers import AutoModelForCausalLM
from warm_cli import Finished, WarmCli, cold

from twofold.cli.main import VERBS

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, llama_base: Path, train_file: Path, held_out_file: Path) -> Path:
    path = tmp_path_factory.mktemp("cli-config") / "config.yaml"
    settings = {
        "base": str(llama_base),
        "data": {"train": str(train_file), "evaluation": str(held_out_file)},
        "adapter": {"r": 4},
        "training": {"batch_size": 6, "max_steps": 3, "learning_rate": "1e-2"},
        "output": str(path.parent / "run"),
        "dtype": "float32",
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def trained(cli: WarmCli, config: Path) -> Finished:
    """`twofold train CONFIG --json`, done once."""
    return cli("train", config, "--json")


@pytest.fixture
def adapter(trained: Finished) -> Path:
    return Path(trained.json()["adapter"])


@pytest.fixture
def broken(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be damaged."""
    return Path(shutil.copytree(adapter, tmp_path / "broken"))


def edited(config: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the configuration with some keys changed, `a__b` meaning `b` inside `a`."""
    settings = yaml.safe_load(config.read_text()) | {"output": str(folder / "run")}
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        settings[outer] = {**settings.get(outer, {}), inner: value} if inner else value
    path = folder / "edited.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(cli: WarmCli, verb: str) -> None:
    found = cli(verb, "--help")
    assert found.code == 0, found.stderr
    assert verb in found.stdout
    assert found.stderr == ""


def test_help_may_stand_behind_a_flag_that_wants_a_value(cli: WarmCli) -> None:
    found = cli("resize", "somewhere", "--tolerance", "--help")
    assert found.code == 0
    assert "held-out loss stays within a tolerance" in " ".join(found.stdout.split())


def test_help_lists_every_verb_and_loads_no_torch() -> None:
    code = (
        "import sys; from twofold.cli.main import main; code = main(['--help']);"
        "print(sorted({'torch', 'transformers', 'rich', 'tyro', 'yaml'} & set(sys.modules)), file=sys.stderr);"
        "sys.exit(code)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "[]"
    assert all(f"  {verb} " in found.stdout for verb in VERBS)
    assert cold("--help").stdout == cold().stdout == found.stdout


def test_the_version_is_printed() -> None:
    assert cold("--version").stdout.startswith("twofold 0.")


# ---------------------------------------------------------------------------------------------- one JSON document


def test_train_prints_its_report(trained: Finished) -> None:
    report = trained.json()
    assert report == json.loads((Path(report["run"]) / "report.json").read_text())
    assert report["steps"] == 3
    assert "held-out loss" in trained.stderr


def test_eval(cli: WarmCli, llama_base: Path, adapter: Path, held_out_file: Path, trained: Finished) -> None:
    model = ("--base", llama_base, "--dtype", "float32", "--data", held_out_file)
    found = cli("eval", *model, "--adapter", adapter, "--json", "--generate", "--max-new-tokens", 3).json()
    assert {"loss", "perplexity", "token_accuracy", "tokens", "examples", "exact_match"} <= set(found)
    assert found["loss"] == trained.json()["evaluation"]["adapter"]["loss"]
    assert found["examples"] == found["generated"] == 7
    assert cli("eval", *model, "--json").json()["loss"] == trained.json()["evaluation"]["base"]["loss"]


def test_plan(cli: WarmCli, llama_base: Path, trained: Finished) -> None:
    found = cli("plan", "--base", llama_base, "--r", 4, "--json").json()
    assert set(found["parameters"]) >= {"base", "trainable", "fraction"}
    assert found["parameters"]["trainable"] == trained.json()["parameters"]["trainable"]
    terms = {"weights", "adapter", "gradients", "optimizer", "activations", "logits", "total"}
    assert terms <= set(found["memory"])
    total = found["memory"]["total"]
    assert 0 < total["low"] < total["expected"] < total["high"]


def test_inspect(cli: WarmCli, adapter: Path) -> None:
    found = cli("inspect", adapter, "--json").json()
    assert found["r"] == 4
    assert len(found["modules"]) == 14
    assert 1 <= found["suggested_rank"] <= 4


def test_what_an_inspection_says_is_short(cli: WarmCli, broken: Path) -> None:
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4000}))
    lines = [line.strip() for line in cli("inspect", broken).stdout.splitlines()]
    assert lines[0].startswith("model.layers.… ")  # what all names begin with stands once
    assert lines[1].startswith("0.mlp.down_proj ")
    told = [line for line in lines if "(odd-scale)" in line]
    assert len(told) == 4
    assert told[-1] == "warning: 11 modules more (odd-scale); --json names them"
    assert lines.index(told[0]) < next(i for i, line in enumerate(lines) if line.startswith("note: "))


def test_intruders_want_a_base(cli: WarmCli, adapter: Path, llama_base: Path) -> None:
    said = cli("inspect", adapter, "--intruders").refusal()
    assert said == "twofold: intruders are directions that the base has not: name it with --base"
    assert "it goes with --intruders" in cli("inspect", adapter, "--base", llama_base, "--exact").refusal()


def test_merge(cli: WarmCli, llama_base: Path, adapter: Path, tmp_path: Path) -> None:
    flags = ("--base", llama_base, "--adapter", adapter, "--dtype", "float32", "-o", tmp_path / "merged")
    found = cli("merge", *flags, "--json").json()
    assert found["output"] == str(tmp_path / "merged")
    assert found["verification"]["passed"] is True
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 0
    assert "exists already" in cli("merge", *flags).refusal()
    asked = ("--base", llama_base, "--adapter", adapter, "--check", tmp_path / "merged", "--json")
    assert cli("merge", *asked).json()["holds_the_adapter"]


def test_merge_takes_what_knows_nothing_of_its_base(
    cli: WarmCli, llama_base: Path, adapter: Path, tmp_path: Path
) -> None:
    cli("export", adapter, "--to", "kohya", "-o", tmp_path / "kohya.safetensors", "--json").json()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama_base), config).save_pretrained(tmp_path / "pissa")
    for given in ("kohya.safetensors", "pissa"):
        flags = ("--base", llama_base, "--adapter", tmp_path / given)
        merged = tmp_path / f"merged-{given}"
        cli("merge", *flags, "-o", merged, "--no-verify", "--json").json()
        assert cli("merge", *flags, "--check", merged, "--json").json()["holds_the_adapter"]


def test_preview(cli: WarmCli, config: Path) -> None:
    found = cli("preview", config, "--examples", 2, "--json").json()
    assert found["train"]["examples"] == 23
    supervised = ["".join(text for text, counts in sample if counts) for sample in found["samples"]]
    assert supervised == ["black cup<|im_end|>", "black hat<|im_end|>"]


def test_preview_refuses_what_it_cannot_show(cli: WarmCli, config: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text(config.read_text() + "\ntask: sequence-classification\n")
    assert "use twofold train --dry-run" in cli("preview", tmp_path / "classes.yaml").refusal()
    assert "examples is -3" in cli("preview", config, "--examples", -3).refusal()


def test_generate_and_chat(cli: WarmCli, llama_base: Path, adapter: Path) -> None:
    flags = ("--base", llama_base, "--adapter", adapter, "--dtype", "float32", "--max-new-tokens", 5)
    found = cli("generate", *flags, "colour of the cup 0?", "--json").json()
    assert found["prompt"] == "colour of the cup 0?"
    plain = cli("generate", *flags, "colour of the cup 0?")
    assert plain.stdout == found["text"] + "\n"
    behind = cli("generate", *flags[:4], "colour of the cup 0?", *flags[4:])
    assert (behind.code, behind.stdout) == (0, plain.stdout)
    assert cli("chat", *flags).code == 0


def test_several_adapters_are_added_up(
    cli: WarmCli, llama_base: Path, adapter: Path, held_out_file: Path, trained: Finished
) -> None:
    half = ("--adapter", f"{adapter}:0.5")
    found = cli("eval", "--base", llama_base, "--dtype", "float32", "--data", held_out_file, *half, *half, "--json")
    assert found.json()["loss"] == pytest.approx(trained.json()["evaluation"]["adapter"]["loss"], rel=1e-5)


def test_base_list(cli: WarmCli) -> None:
    assert "smollm2-135m-instruct" in [b["name"] for b in cli("base", "list", "--json").json()]


def test_a_dry_run(cli: WarmCli, config: Path, tmp_path: Path) -> None:
    found = cli("train", config, "--output", tmp_path / "run", "--dry-run", "--json").json()
    assert found["steps"] == 3
    assert found["train"]["supervised_tokens"] > 0
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- the configuration


def test_flags_override_the_file_and_numbers_may_have_exponents(cli: WarmCli, config: Path, tmp_path: Path) -> None:
    flags = ("--output", tmp_path / "run", "--adapter.r", 2, "--training.max-steps", 1, "--adapter.lora-alpha", 7)
    assert cli("train", config, *flags, "--no-verify").code == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["adapter"]["r"] == 2
    assert written["adapter"]["lora_alpha"] == 7
    assert written["training"]["max_steps"] == 1
    assert written["training"]["learning_rate"] == 0.01
    assert written["verify"] is False
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (2, 7)


# ---------------------------------------------------------------------------------------------- mistakes


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
