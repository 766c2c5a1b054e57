"""`eval` and `generate` with adapters of other tasks: measured as the task measures, or refused in a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from test_tasks import answered, bert, configured, labelled, t5
from tiny_base import tokenizer, write_base, write_jsonl
from warm_cli import WarmCli

from twofold.engine.answering import answer_tokens
from twofold.engine.request import Request, Sampling
from twofold.errors import BaseError, ConfigError
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.combine import combine
from twofold.recipes.generate import GenerationConfig, answers
from twofold.recipes.inspect import compare, inspect_adapter
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import train

pytest_plugins = ("tiny_fixtures",)

Trained = tuple[TrainConfig, dict[str, Any]]


def trained(folder: Path, task: Any, body: Callable[[int], Any], rows: Any) -> Trained:
    tokens = tokenizer(template=None)
    config = configured(folder / task, write_base(folder / f"{task}-base", body(len(tokens)), tokens), task, rows)
    return config, train(replace(config, verify=False))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("made"), "sequence-classification", bert, labelled)


def mindful_t5(vocabulary: int) -> Any:
    """What its decoder says next hangs on all that it said before."""
    model = t5(vocabulary)
    with torch.no_grad():
        for block in model.decoder.block:
            block.layer[0].SelfAttention.o.weight *= 20
    return model


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("made"), "seq2seq", mindful_t5, answered)


def asked(cli: WarmCli, verb: str, trained: Trained, *more: Any) -> Any:
    config, report = trained
    return cli(verb, "--base", config.base, "--adapter", report["adapter"], "--dtype", "float32", *more, "--json")


def test_eval_of_a_classifier_gives_the_figures_of_its_run(cli: WarmCli, classifier: Trained) -> None:
    config, report = classifier
    found = asked(cli, "eval", classifier, "--data", config.data.evaluation).json()
    assert found == pytest.approx(report["evaluation"]["adapter"], rel=1e-5)
    assert found.keys() == {"loss", "accuracy", "examples"}


def test_a_classifier_is_cut_by_its_loss_and_keeps_its_head(cli: WarmCli, classifier: Trained, tmp_path: Path) -> None:
    config, report = classifier
    flags = ("--base", config.base, "--dtype", "float32", "--data", config.data.evaluation, "--json")
    found = cli("resize", report["adapter"], "--tolerance", 100, "-o", tmp_path / "small", *flags).json()
    assert found["r"] == 1
    assert found["losses"]["4"] == pytest.approx(report["evaluation"]["adapter"]["loss"], rel=1e-4)
    small = cli("eval", "--adapter", tmp_path / "small", *flags).json()
    assert small["loss"] == pytest.approx(found["losses"]["1"], rel=1e-4)


def test_eval_of_an_encoder_decoder_gives_the_figures_of_its_run(cli: WarmCli, answerer: Trained) -> None:
    config, report = answerer
    found = asked(cli, "eval", answerer, "--data", config.data.evaluation).json()
    expected = report["evaluation"]["adapter"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected["loss"]), rel=1e-4)
    assert (found["tokens"], found["examples"]) == (expected["tokens"], 8)


def test_answers_are_those_of_transformers_and_peft(answerer: Trained) -> None:
    config, report = answerer
    prompts = [row["prompt"] for row in answered(6, start=40)]
    base = load_with_adapters(config.base, [report["adapter"]], "float32", "cpu")
    ours = answers(base, [[{"role": "user", "content": p}] for p in prompts], GenerationConfig(max_new_tokens=9))
    plain = hf.AutoModelForSeq2SeqLM.from_pretrained(config.base)
    model, tokens = peft.PeftModel.from_pretrained(plain, report["adapter"]).eval(), base.tokenizer
    for prompt, answer in zip(prompts, ours, strict=True):
        given = torch.tensor([tokens(prompt)["input_ids"]])
        (made,) = model.generate(input_ids=given, max_new_tokens=9, do_sample=False, num_beams=1)
        assert answer == tokens.decode(made, skip_special_tokens=True)
    assert len(set(ours)) > 1
    drawn = GenerationConfig(max_new_tokens=9, sampling=Sampling(temperature=3.0, seed=5))
    some = [answers(base, [[{"role": "user", "content": prompts[0]}]], drawn) for _ in range(2)]
    assert some[0] == some[1] != ours[:1]


def test_an_answer_ends_before_the_token_that_ends_it(answerer: Trained) -> None:
    config, report = answerer
    base = load_with_adapters(config.base, [report["adapter"]], "float32", "cpu")
    prompt = base.tokenizer("colour of the cup?")["input_ids"]
    whole = list(answer_tokens(base.model, Request(token_ids=prompt, max_new_tokens=9)))
    assert len(whole) == 9
    end = next(t for t in whole if t != whole[0])
    stopping = Request(token_ids=prompt, max_new_tokens=9, stop_ids=(end,))
    assert list(answer_tokens(base.model, stopping)) == whole[: whole.index(end)]


def test_generate_answers_a_prompt_and_eval_counts_exact_answers(
    cli: WarmCli, answerer: Trained, tmp_path: Path
) -> None:
    prompts = [row["prompt"] for row in answered(3, start=40)]
    texts = [asked(cli, "generate", answerer, "--max-new-tokens", 6, p).json()["text"] for p in prompts]
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, [texts[0], f" {texts[1]} ", "no"], strict=True)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = asked(cli, "eval", answerer, "--data", data, "--generate", "--max-new-tokens", 6).json()
    assert found["exact_match"] == pytest.approx(2 / 3)


def test_pefts_adapter_without_a_task_goes_on_an_encoder_decoder(cli: WarmCli, tmp_path: Path) -> None:
    tokens = tokenizer(template=None)
    base = write_base(tmp_path / "base", t5(len(tokens)), tokens)
    plain = hf.AutoModelForSeq2SeqLM.from_pretrained(base)
    config = peft.LoraConfig(r=3, target_modules=["q", "wo"], init_lora_weights=False)
    model = peft.get_peft_model(plain, config)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    flags = ("--base", base, "--adapter", tmp_path / "adapter", "--dtype", "float32")
    cli("merge", *flags, "-o", tmp_path / "merged", "--json").json()
    merged = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").state_dict()
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(merged[name], value, atol=1e-6), name
    assert isinstance(load_with_adapters(str(base), [str(tmp_path / "adapter")]).model, type(plain))


def test_what_generates_nothing_says_so(cli: WarmCli, classifier: Trained, answerer: Trained) -> None:
    config, _ = classifier
    said = "trained to name a class (blue, green, red) and generates no text; twofold eval measures it"
    assert said in asked(cli, "generate", classifier, "a cup").refusal()
    assert said in asked(cli, "eval", classifier, "--data", config.data.evaluation, "--generate").refusal()
    assert "answers a single prompt" in asked(cli, "generate", answerer, "--system", "be brief", "a cup").refusal()


def test_a_system_message_is_not_dropped_in_silence(cli: WarmCli, classifier: Trained) -> None:
    config, _ = classifier
    found = asked(cli, "eval", classifier, "--data", config.data.evaluation, "--system", "be brief")
    assert "a sequence classifier has none; leave it out" in found.refusal()


def test_a_conversation_is_not_for_an_encoder_decoder(answerer: Trained) -> None:
    config, report = answerer
    base = load_with_adapters(config.base, [report["adapter"]], "float32", "cpu")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(ConfigError, match="sequence-to-sequence model answers a single prompt"):
        answers(base, [turns], GenerationConfig())


@pytest.mark.parametrize("kind", ["classifier", "answerer"])
def test_the_base_of_a_task_is_known_without_its_weights(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config, report = request.getfixturevalue(kind)
    findings = inspect_adapter(report["adapter"], config.base).findings
    assert not [f for f in findings if f.severity == "error" or f.code == "no-fingerprint"]
    combine({report["adapter"]: 1.0}, tmp_path / "same", base=config.base)
    assert compare(report["adapter"], tmp_path / "same").cosine == pytest.approx(1)


def test_a_head_that_starts_at_random_has_no_values_to_add_to(classifier: Trained, tmp_path: Path) -> None:
    config, report = classifier
    with pytest.raises(BaseError, match="which starts at random in every training"):
        combine({report["adapter"]: 0.5}, tmp_path / "half", base=config.base)


def test_a_file_of_peft_says_that_it_is_for_a_sequence_to_sequence_model(answerer: Trained, tmp_path: Path) -> None:
    config, _ = answerer
    plain = hf.AutoModelForSeq2SeqLM.from_pretrained(config.base)
    settings = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"])
    peft.get_peft_model(plain, settings).save_pretrained(tmp_path / "a")
    base = load_with_adapters(config.base, [str(tmp_path / "a")], "float32", "cpu")
    assert base.model.config.is_encoder_decoder
