"""`train` for sequence classification and for encoder-decoders: what it learns, proves, resumes and refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from tiny_base import COLOURS, THINGS, tokenizer, write_base, write_jsonl
from tiny_runs import Heard, adapter_tensors, changed

from twofold.data.examples import DataConfig
from twofold.errors import ConfigError, DataError
from twofold.events import Step
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.evaluate import evaluate
from twofold.recipes.grid import RANK
from twofold.recipes.merge import merge_checkpoint
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.side_by_side import SideBySide
from twofold.recipes.sweep import Sweep, sweep
from twofold.recipes.train import dry_run, train
from twofold.training.optim import TrainingConfig

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert(vocabulary: int) -> Any:
    """An encoder with dropout and without any head of its own, pooler included."""
    torch.manual_seed(1)
    config = hf.BertConfig(**SIZES, vocab_size=vocabulary, pad_token_id=0, initializer_range=0.15)
    return hf.BertModel(config, add_pooling_layer=False).eval()


def t5(vocabulary: int) -> Any:
    torch.manual_seed(1)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1}
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=vocabulary, **sizes, **ends)).eval()


def llama_body(vocabulary: int) -> Any:
    torch.manual_seed(1)
    config = hf.LlamaConfig(**SIZES, vocab_size=vocabulary, initializer_range=0.15, pad_token_id=None, eos_token_id=2)
    return hf.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["bert", "llama"])
def classifier_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = tokenizer(template=None)
    make = {"bert": bert, "llama": llama_body}[request.param]
    return write_base(tmp_path_factory.mktemp("bases") / request.param, make(len(tokens)), tokens)


@pytest.fixture(scope="module")
def t5_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = tokenizer(template=None)
    return write_base(tmp_path_factory.mktemp("bases") / "tiny-t5", t5(len(tokens)), tokens)


def labelled(count: int, start: int = 0, labels: Any = COLOURS) -> list[dict[str, Any]]:
    return [
        {"text": f"the {THINGS[i % 10]} number {i}", "label": labels[len(THINGS[i % 10]) % 3]}
        for i in range(start, start + count)
    ]


def answered(count: int, start: int = 0) -> list[dict[str, str]]:
    things = [THINGS[i % 10] for i in range(start, start + count)]
    return [{"prompt": f"colour of the {t} {i}?", "completion": COLOURS[len(t) % 4]} for i, t in enumerate(things)]


def configured(folder: Path, base: Path, task: Any, rows: Any) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    return TrainConfig(
        base=str(base),
        task=task,
        data=DataConfig(
            train=str(write_jsonl(folder / "train.jsonl", rows(24))),
            evaluation=str(write_jsonl(folder / "held_out.jsonl", rows(8, start=40))),
        ),
        adapter=AdapterSettings(r=4),
        training=TrainingConfig(batch_size=6, epochs=5, learning_rate=0.01),
        output=str(folder / "run"),
        dtype="float32",
        device="cpu",
    )


@pytest.fixture
def classifying(classifier_base: Path, tmp_path: Path) -> TrainConfig:
    return configured(tmp_path, classifier_base, "sequence-classification", labelled)


@pytest.fixture
def answering(t5_base: Path, tmp_path: Path) -> TrainConfig:
    return configured(tmp_path, t5_base, "seq2seq", answered)


def files(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


# ---------------------------------------------------------------------------------------------- classification


def test_a_classifier_learns_is_proved_and_says_the_same_in_peft(classifying: TrainConfig) -> None:
    before = files(classifying.base)
    report = train(classifying)
    figures = report["evaluation"]
    assert figures["adapter"]["loss"] < 0.7 * figures["base"]["loss"]
    assert figures["merged"]["accuracy"] == figures["adapter"]["accuracy"]
    assert report["verification"]["passed"] is True
    assert report["base_unchanged"] is True
    assert files(classifying.base) == before
    ours = json.loads((Path(report["adapter"]) / "twofold.json").read_text())["training"]
    names = sorted(COLOURS[:3])
    assert (ours["task"], ours["labels"]) == ("sequence-classification", names)
    assert "Accuracy" in (Path(report["run"]) / "report.html").read_text()

    raw = json.loads((Path(report["adapter"]) / "adapter_config.json").read_text())
    assert raw["task_type"] == "SEQ_CLS"
    tokens = hf.AutoTokenizer.from_pretrained(classifying.base)
    plain = hf.AutoModelForSequenceClassification.from_pretrained(classifying.base, num_labels=3)
    model = peft.PeftModel.from_pretrained(plain, report["adapter"]).eval()
    loss, right = 0.0, 0
    rows = labelled(8, start=40)
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens(row["text"])["input_ids"]])).logits[0]
        loss -= float(logits.log_softmax(-1)[names.index(row["label"])]) / len(rows)
        right += int(logits.argmax()) == names.index(row["label"])
    assert figures["adapter"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert figures["adapter"]["accuracy"] == right / len(rows)
    assert figures["adapter"]["examples"] == len(rows)


def test_the_preflight_names_the_classes_and_the_head_is_trained_whole(classifying: TrainConfig) -> None:
    found = dry_run(classifying).as_json()
    rows = labelled(24)
    assert found["train"]["classes"] == {n: sum(r["label"] == n for r in rows) for n in sorted(COLOURS[:3])}
    assert found["train"]["supervised_tokens"] == 24
    assert all(tokens[-1][1] and tokens[-1][0][3:] in COLOURS for tokens in found["samples"])
    report = train(changed(classifying, max_steps=1))
    saved = {k for k in adapter_tensors(report["adapter"]) if "lora_" not in k}
    heads = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    pooler = {"base_model.model.bert.pooler.dense.weight", "base_model.model.bert.pooler.dense.bias"}
    assert saved == (heads | pooler if "bert" in classifying.base else {"base_model.model.score.weight"})


def test_a_head_that_the_base_lacks_is_saved_whatever_else_is(classifying: TrainConfig) -> None:
    """Else its random values would be lost: other ones stand in for them when the base is loaded again."""
    saved = "layer.0.output.dense" if "bert" in classifying.base else "layers.0.mlp"
    config = replace(classifying, adapter=AdapterSettings(r=4, modules_to_save=(saved,)))
    report = train(changed(config, max_steps=2, seed=3))
    base = load_with_adapters(config.base, [report["adapter"]], "float32", "cpu")
    again = evaluate(base, DataConfig(train=str(config.data.evaluation)))
    assert again["loss"] == pytest.approx(report["evaluation"]["adapter"]["loss"], rel=1e-6)


def test_a_sweep_gives_every_seed_the_head_of_its_own_training(classifying: TrainConfig, tmp_path: Path) -> None:
    config = changed(classifying, max_steps=2)
    found = sweep(config, Sweep(axes={RANK: [4]}, seeds=2, how=SideBySide(halvings=0)))
    second = found["cells"][1]
    report = train(replace(changed(config, seed=1), output=str(tmp_path / "alone"), verify=False))
    ours, theirs = adapter_tensors(Path(found["sweep"]) / second["adapter"]), adapter_tensors(report["adapter"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert second["loss"] == report["evaluation"]["adapter"]["loss"]


def test_a_killed_run_goes_on_with_the_same_bits(classifying: TrainConfig, tmp_path: Path) -> None:
    config = changed(classifying, checkpoint_every=5, max_steps=15)
    whole = train(config)
    other = replace(config, output=str(tmp_path / "killed"))
    with pytest.raises(KeyboardInterrupt):
        train(other, StoppingAfter(8))
    resumed = train(other, resume=True)
    assert resumed["steps"] == 15
    ours, theirs = adapter_tensors(whole["adapter"]), adapter_tensors(resumed["adapter"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


class StoppingAfter(Heard):
    """A subscriber that interrupts the run after some steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def __call__(self, event: Any) -> None:
        super().__call__(event)
        if isinstance(event, Step) and event.step == self.steps:
            raise KeyboardInterrupt


def test_micro_batches_of_other_lengths_add_up_to_the_same_step(classifying: TrainConfig, tmp_path: Path) -> None:
    base = shutil.copytree(classifying.base, tmp_path / "quiet")
    settings = json.loads((base / "config.json").read_text())
    quiet = {k: 0.0 for k in settings if k.endswith("dropout_prob")}
    (base / "config.json").write_text(json.dumps(settings | quiet))
    config = replace(classifying, base=str(base))
    whole = train(changed(config, max_steps=3))
    parts = train(changed(replace(config, output=str(tmp_path / "parts")), max_steps=3, micro_batch_size=1))
    for key, tensor in adapter_tensors(whole["adapter"]).items():
        torch.testing.assert_close(adapter_tensors(parts["adapter"])[key], tensor, rtol=1e-3, atol=2e-4)


def test_numbers_are_labels_too_and_unknown_ones_are_refused(classifying: TrainConfig, tmp_path: Path) -> None:
    numbered = configured(
        tmp_path / "n",
        Path(classifying.base),
        "sequence-classification",
        lambda *a, **k: labelled(*a, **k, labels=(10, 2, 7)),
    )
    assert list(dry_run(numbered).as_json()["train"]["classes"]) == ["2", "7", "10"]
    write_jsonl(Path(str(numbered.data.evaluation)), [{"text": "a cup", "label": 3}])
    with pytest.raises(DataError, match="example 1: the label '3' is none"):
        dry_run(numbered)
    write_jsonl(Path(numbered.data.train), [{"text": "a cup", "label": 3}])
    with pytest.raises(DataError, match="nothing to tell apart"):
        dry_run(numbered)
    write_jsonl(Path(numbered.data.train), [{"text": "a cup", "label": 0.5}, {"text": "a hat", "label": 1.5}])
    with pytest.raises(DataError, match=r"example 1: a label must be .* found 0.5"):
        dry_run(numbered)
    write_jsonl(Path(numbered.data.train), [{"text": "a cup"}])
    with pytest.raises(DataError, match="'text' \\+ 'label'"):
        dry_run(numbered)


def test_going_on_from_an_adapter_needs_its_classes(classifying: TrainConfig, tmp_path: Path) -> None:
    first = train(changed(classifying, max_steps=2))
    on = replace(classifying, adapter=AdapterSettings(init_from=first["adapter"]), output=str(tmp_path / "on"))
    assert train(changed(on, max_steps=1))["evaluation"]["base"] == first["evaluation"]["base"]
    write_jsonl(Path(classifying.data.train), labelled(24, labels=("up", "down", "left")))
    with pytest.raises(ConfigError, match=r"with labels \['blue'.*\['down'"):
        dry_run(replace(on, data=replace(on.data, evaluation=None)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization": "nf4"}, "quantization cannot go with task: seq2seq"),
        ({"adapter": AdapterSettings(init_lora_weights="eva")}, "adapter.init_lora_weights: eva cannot"),
        ({"training": TrainingConfig(cache_frozen=True)}, "training.cache_frozen cannot"),
        ({"data": DataConfig(train="x.jsonl", system="hello")}, "data.system cannot"),
    ],
)
def test_what_only_causal_models_can_do_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TrainConfig(**({"data": DataConfig(train="x.jsonl"), "task": "seq2seq"} | changes))


# ---------------------------------------------------------------------------------------------- encoder-decoders


def test_an_encoder_decoder_learns_is_proved_and_says_the_same_in_peft(answering: TrainConfig) -> None:
    report = train(answering)
    figures = report["evaluation"]
    assert figures["adapter"]["loss"] < 0.9 * figures["base"]["loss"]
    assert report["verification"]["passed"] is True
    assert report["base_unchanged"] is True
    raw = json.loads((Path(report["adapter"]) / "adapter_config.json").read_text())
    assert raw["task_type"] == "SEQ_2_SEQ_LM"
    tokens = hf.AutoTokenizer.from_pretrained(answering.base)
    plain = hf.AutoModelForSeq2SeqLM.from_pretrained(answering.base)
    model = peft.PeftModel.from_pretrained(plain, report["adapter"]).eval()
    loss, count = 0.0, 0
    for row in answered(8, start=40):
        prompt, answer = (torch.tensor([tokens(row[k])["input_ids"]]) for k in ("prompt", "completion"))
        with torch.no_grad():
            loss += float(model(input_ids=prompt, labels=answer).loss) * answer.numel()
        count += answer.numel()
    assert figures["adapter"]["loss"] == pytest.approx(loss / count, rel=1e-4)
    assert figures["adapter"]["tokens"] == count


def test_a_model_of_another_task_is_refused_by_name(answering: TrainConfig, classifier_base: Path) -> None:
    with pytest.raises(Exception, match="cannot load a sequence-to-sequence model from"):
        dry_run(replace(answering, base=str(classifier_base)))


# ---------------------------------------------------------------------------------------------- merging


def merged(config: TrainConfig, folder: Path) -> dict[str, Any]:
    base = load_with_adapters(config.base, [train(config)["adapter"]], "float32", "cpu")
    return merge_checkpoint(base, folder)


def test_a_merged_classifier_says_the_same_and_names_its_classes(classifying: TrainConfig, tmp_path: Path) -> None:
    assert merged(classifying, tmp_path / "merged")["verification"]["passed"] is True
    found = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert found.config.id2label == dict(enumerate(sorted(COLOURS[:3])))


def test_a_merged_encoder_decoder_says_the_same(answering: TrainConfig, tmp_path: Path) -> None:
    assert merged(answering, tmp_path / "merged")["verification"]["passed"] is True
