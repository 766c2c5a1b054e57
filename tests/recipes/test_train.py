"""`train`: what a run leaves behind, what it proves, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_base import chats, pairs, write_jsonl
from transformers import AutoModelForCausalLM
from warm_cli import WarmCli

from twofold.adapter.attach import attach, disabled
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, open_adapter
from twofold.base.load import load_base
from twofold.data.examples import DataConfig
from twofold.errors import AdapterFileError, ConfigError, ForeignBaseError, NonFiniteLossError, ProofError, RunError
from twofold.events import Checkpointed, Evaluated, Event, Message, Step, Warned
from twofold.recipes.proof import base_digest, proof_batch, verify_merge
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.train import dry_run, train
from twofold.tensorfile import TensorFile
from twofold.training.optim import TrainingConfig

pytest_plugins = ("tiny_fixtures",)

TRAINING = TrainingConfig(batch_size=6, epochs=4, learning_rate=0.02)


class Heard(list[Event]):
    """A subscriber that keeps what it hears."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [e for e in self if isinstance(e, kind)]


@pytest.fixture
def config(llama_base: Path, train_file: Path, held_out_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        base=str(llama_base),
        data=DataConfig(train=str(train_file), evaluation=str(held_out_file)),
        adapter=AdapterSettings(r=4),
        training=TRAINING,
        output=str(tmp_path / "run"),
        dtype="float32",
        device="cpu",
    )


def changed(config: TrainConfig, **training: Any) -> TrainConfig:
    return replace(config, training=replace(config.training, **training))


def adapter_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


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


def load_report(run: Path) -> Any:
    return json.loads((run / "preflight.json").read_text())


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


# ---------------------------------------------------------------------------------------------- best and last


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


# ---------------------------------------------------------------------------------------------- the proof


@pytest.fixture
def adapted(llama_base: Path, held_out_file: Path) -> tuple[Any, Any]:
    """A model with an adapter that says something, and tokens to compare it on."""
    base = load_base(str(llama_base), "float32", "cpu")
    attach(base.model, LoraConfig(r=4))
    for name, parameter in base.model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.02)
    rows = map(json.loads, held_out_file.read_text().splitlines())
    return base.model, proof_batch([e for r in rows for e in base.renderer.chat(r["messages"])], base.device)


def test_the_proof_fails_when_one_merged_weight_is_spoiled(adapted: tuple[Any, Any]) -> None:
    from twofold.merging.checkpoint import merged_state

    model, batch = adapted
    merged = AutoModelForCausalLM.from_config(model.config).eval()
    merged.load_state_dict(merged_state(model))
    assert verify_merge(model, batch, 0, merged).passed
    assert verify_merge(model, batch, 0).passed
    with torch.no_grad():
        merged.model.layers[1].mlp.down_proj.weight[3, 5] += 0.01
    spoiled = verify_merge(model, batch, 0, merged)
    assert not spoiled.passed
    with pytest.raises(
        ProofError, match="the merged model differs from the adapter by more than the model's own noise"
    ):
        spoiled.require("the merged model")


def test_the_proof_fails_for_an_adapter_that_changes_nothing(llama_base: Path, adapted: tuple[Any, Any]) -> None:
    """Merged and adapter agree then, but so would anything."""
    _, batch = adapted
    base = load_base(str(llama_base), "float32", "cpu")
    attach(base.model, LoraConfig(r=4))
    found = verify_merge(base.model, batch, 0)
    assert found.max_abs_logit_difference <= found.tolerance
    assert not found.passed
    said: list[Event] = []
    found.require("the merged model", said.append)
    assert "changes no logit by more than" in said[0].record()["text"]


def test_the_base_digest_sees_one_changed_value_and_no_adapter(adapted: tuple[Any, Any]) -> None:
    model, _ = adapted
    before = base_digest(model)
    with disabled(model):
        assert base_digest(model) == before
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.shares["default"].A.add_(1.0)
        assert base_digest(model) == before
        model.model.layers[0].self_attn.q_proj.base.weight[0, 0] += 1e-6
    assert base_digest(model) != before


# ---------------------------------------------------------------------------------------------- training that fails


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


def test_tensorboard_gets_every_step_and_evaluation(config: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    heard = Heard()
    train(changed(replace(config, trackers=("tensorboard",)), max_steps=4, evaluate_every=2), heard)
    found = EventAccumulator(str(Path(config.output) / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in found.Scalars("train/loss")] == [
        (s.step, pytest.approx(s.loss, rel=1e-6)) for s in heard.of(Step)
    ]
    assert [s.step for s in found.Scalars("evaluation/loss")] == [2, 4]


def test_bfloat16_trains_and_its_proof_has_the_tolerance_of_bfloat16(config: TrainConfig, tmp_path: Path) -> None:
    narrow = train(replace(config, dtype="bfloat16"))
    wide = train(replace(config, output=str(tmp_path / "wide")))
    assert narrow["verification"]["passed"]
    assert narrow["verification"]["tolerance"] > 100 * wide["verification"]["tolerance"]
    assert narrow["evaluation"]["adapter"]["loss"] == pytest.approx(wide["evaluation"]["adapter"]["loss"], rel=0.1)
    assert all(t.dtype == torch.float32 for t in adapter_tensors(narrow["adapter"]).values())


def test_the_adapter_loads_over_a_fresh_base(config: TrainConfig, llama_base: Path) -> None:
    report = train(config)
    fresh = load_base(str(llama_base), "float32", "cpu")
    load_adapter(fresh.model, report["adapter"])
    loaded = {n: p for n, p in fresh.model.named_parameters() if n.endswith((".A", ".B"))}
    assert len(loaded) == len(adapter_tensors(report["adapter"])) == 28
