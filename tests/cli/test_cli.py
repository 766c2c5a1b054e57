"""The command line: one document on stdout, one sentence for a mistake, and the codes that scripts rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import yaml
from transformers import AutoModelForCausalLM
from warm_cli import Finished, WarmCli, cold

from twofold.cli.main import VERBS

pytest_plugins = ("tiny_fixtures",)


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
