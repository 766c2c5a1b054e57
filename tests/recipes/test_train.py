"""`train`: what a run leaves behind, what it proves, and what it foresees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_base import chats, pairs, write_jsonl
from tiny_runs import Heard, adapter_tensors, changed, load_report
from transformers import AutoModelForCausalLM

from twofold.adapter.files import load_adapter, open_adapter
from twofold.base.load import load_base
from twofold.data.examples import DataConfig
from twofold.events import Message, Step, Warned
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import dry_run, train

pytest_plugins = ("tiny_fixtures",)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_learns_and_leaves_everything_it_promised(config: TrainConfig, llama_base: Path) -> None:
    before, heard = files(llama_base), Heard()
    report = train(config, heard)
    run = Path(config.output)
    assert {"run", "adapter", "steps", "seconds", "tokens", "supervised_tokens", "tokens_per_second"} <= set(report)
    assert report["peak_memory_bytes"] > 0
    assert report["steps"] == 16
    assert report["run"] == str(run)
    loss = {name: found["loss"] for name, found in report["evaluation"].items()}
    assert set(loss) == {"base", "adapter", "merged"}
    assert loss["adapter"] < 0.7 * loss["base"]
    assert loss["merged"] == pytest.approx(loss["adapter"], abs=1e-4)
    proof = report["verification"]
    assert proof["passed"] is True
    assert 0 <= proof["max_abs_logit_difference"] <= proof["tolerance"] < proof["control_difference"]
    assert report["base_unchanged"] is True
    assert files(llama_base) == before
    assert json.loads((run / "report.json").read_text()) == report
    written = {p.name for p in run.iterdir()}
    assert written == {
        "config.yaml",
        "preflight.json",
        "events.jsonl",
        "checkpoints",
        "adapter",
        "report.json",
        "report.html",
    }
    steps = heard.of(Step)
    assert [s.step for s in steps] == list(range(1, 17))
    assert steps[-1].tokens == report["tokens"] == 4 * load_report(run)["train"]["tokens"]
    assert (
        steps[-1].supervised_tokens == report["supervised_tokens"] == 4 * load_report(run)["train"]["supervised_tokens"]
    )
    assert sum(s.loss for s in steps[-4:]) < 0.7 * sum(s.loss for s in steps[:4])


def test_the_evaluation_is_what_transformers_finds_with_the_adapter_loaded_by_peft(
    config: TrainConfig, llama_base: Path, held_out_file: Path
) -> None:
    from peft import PeftModel

    report = train(config)
    base = load_base(str(llama_base), "float32", "cpu")
    plain = AutoModelForCausalLM.from_pretrained(llama_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, report["adapter"]).eval()
    loss, count = 0.0, 0
    for row in map(json.loads, held_out_file.read_text().splitlines()):
        (example,) = base.renderer.chat(row["messages"])
        ids = torch.tensor([example.token_ids])
        labels = torch.where(torch.tensor([example.supervised]), ids, -100)
        with torch.no_grad():
            loss += float(model(input_ids=ids, labels=labels).loss) * example.supervised_tokens
        count += example.supervised_tokens
    assert report["evaluation"]["adapter"]["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert report["evaluation"]["adapter"]["tokens"] == count


def test_without_held_out_data_and_proof_the_report_says_null(config: TrainConfig) -> None:
    bare = replace(config, data=replace(config.data, evaluation=None), verify=False)
    report = train(changed(bare, max_steps=2))
    assert report["evaluation"] == {"base": None, "adapter": None, "merged": None}
    assert report["verification"] is None
    assert report["steps"] == 2
    assert report["base_unchanged"] is True


def test_the_adapter_keeps_what_an_engine_needs_beside_it(config: TrainConfig, llama_base: Path) -> None:
    provenance = open_adapter(Path(train(changed(config, max_steps=1))["adapter"])).provenance
    base = load_base(str(llama_base), "float32", "cpu")
    assert provenance is not None
    assert provenance.base == base.fingerprint.as_json()
    assert provenance.chat_template == base.tokenizer.chat_template
    assert provenance.eos_token_ids == [base.tokenizer.eos_token_id]
    assert provenance.training["steps"] == 1


def test_micro_batches_add_up_to_the_same_step(config: TrainConfig, tmp_path: Path) -> None:
    """Weighted by supervised tokens, whose number differs from example to example."""
    whole = train(changed(config, max_steps=3))
    parts = train(changed(replace(config, output=str(tmp_path / "parts")), max_steps=3, micro_batch_size=1))
    for key, tensor in adapter_tensors(whole["adapter"]).items():
        torch.testing.assert_close(adapter_tensors(parts["adapter"])[key], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("base", ["llama_base", "gpt2_base"])
def test_gradient_checkpointing_changes_memory_and_not_the_adapter(
    base: str, config: TrainConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", [{"text": f"{q} {a}"} for q, a in pairs(12)])
    config = replace(config, base=str(request.getfixturevalue(base)), data=DataConfig(train=str(data)), verify=False)
    config = replace(config, adapter=replace(config.adapter, lora_dropout=0.3))
    kept = train(changed(config, max_steps=3))
    again = train(changed(replace(config, output=str(tmp_path / "again")), max_steps=3, gradient_checkpointing=True))
    for key, tensor in adapter_tensors(kept["adapter"]).items():
        torch.testing.assert_close(adapter_tensors(again["adapter"])[key], tensor, rtol=1e-4, atol=1e-5)


def rows_of(kind: str) -> list[dict[str, Any]]:
    return {
        "text": [{"text": f"{q} {a}"} for q, a in pairs(8)],
        "prompt-completion": [{"prompt": q, "completion": f" {a}"} for q, a in pairs(8)],
        "instruction": [{"instruction": "name the colour", "input": q, "output": a} for q, a in pairs(8)],
        "conversations": [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs(8)
        ],
    }[kind]


@pytest.mark.parametrize(
    ("base", "kind"),
    [("llama_base", k) for k in ("text", "prompt-completion", "instruction", "conversations")]
    + [("gpt2_base", k) for k in ("text", "prompt-completion", "instruction")],
)
def test_every_format_trains_on_both_paths(
    base: str, kind: str, config: TrainConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data, heard = write_jsonl(tmp_path / "train.jsonl", rows_of(kind)), Heard()
    config = replace(config, base=str(request.getfixturevalue(base)), data=DataConfig(train=str(data)))
    report = train(changed(config, batch_size=8, epochs=12), heard)
    losses = [s.loss for s in heard.of(Step)]
    assert losses[-1] < 0.8 * losses[0]
    assert report["verification"]["passed"]
    assert load_report(Path(config.output))["train"]["format"] == kind
    path = next(m.text for m in heard.of(Message) if "path:" in m.text)
    assert path.startswith("fast path" if base == "llama_base" else "plain path: GPT2LMHeadModel")


# ---------------------------------------------------------------------------------------------- looking first


def test_a_dry_run_foresees_and_writes_nothing(config: TrainConfig) -> None:
    foreseen = dry_run(config)
    assert not Path(config.output).exists()
    report = train(config)
    assert foreseen.steps == report["steps"]
    assert foreseen.parameters.trainable == report["parameters"]["trainable"]
    stored = sum(t.numel() for t in adapter_tensors(report["adapter"]).values())
    assert foreseen.parameters.trainable == stored


def test_truncation_is_warned_of_with_counts(config: TrainConfig, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "hm " * 60}, {"role": "assistant", "content": "yes yes yes"}]}
    data, heard = write_jsonl(tmp_path / "long.jsonl", [*chats(6), long]), Heard()
    train(changed(replace(config, data=DataConfig(train=str(data), max_length=64)), max_steps=1), heard)
    (said,) = [w.text for w in heard.of(Warned)]
    assert said.startswith("1 examples are over data.max_length; ")
    lost = load_report(Path(config.output))["train"]["lost_supervised_tokens"]
    assert lost > 3
    assert f"{lost} supervised tokens are lost" in said


def test_bfloat16_trains_and_its_proof_has_the_tolerance_of_bfloat16(config: TrainConfig, tmp_path: Path) -> None:
    narrow = train(replace(config, dtype="bfloat16"))
    wide = train(replace(config, output=str(tmp_path / "wide")))
    assert narrow["verification"]["passed"]
    assert narrow["verification"]["tolerance"] > 100 * wide["verification"]["tolerance"]
    assert narrow["evaluation"]["adapter"]["loss"] == pytest.approx(wide["evaluation"]["adapter"]["loss"], rel=0.1)
    assert all(t.dtype == torch.float32 for t in adapter_tensors(narrow["adapter"]).values())


def test_an_adapter_too_weak_to_be_merged_in_bfloat16_is_a_finished_run_and_a_warning(config: TrainConfig) -> None:
    """Rounding the merged weights loses more of it than the model's own noise; the adapter apart is as good as any."""
    heard = Heard()
    weak = changed(config, learning_rate=1e-4, max_steps=2)
    report = train(replace(weak, dtype="bfloat16"), heard)
    assert not report["verification"]["passed"]
    assert (Path(report["run"]) / "report.json").exists()
    (warned,) = [w.text for w in heard.of(Warned) if "a merged model" in w.text]
    assert "merge into float32" in warned or "nothing is proved" in warned


def test_the_adapter_loads_over_a_fresh_base(config: TrainConfig, llama_base: Path) -> None:
    report = train(config)
    fresh = load_base(str(llama_base), "float32", "cpu")
    load_adapter(fresh.model, report["adapter"])
    loaded = {n: p for n, p in fresh.model.named_parameters() if n.endswith((".A", ".B"))}
    assert len(loaded) == len(adapter_tensors(report["adapter"])) == 28
