"""`eval`: the loss of the model as it stands, and answers that match letter for letter."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_base import pairs, write_jsonl

from twofold.base.load import Base, load_base
from twofold.data.examples import DataConfig
from twofold.errors import DataError
from twofold.recipes.evaluate import evaluate, exact_match
from twofold.recipes.generate import GenerationConfig, answers

pytest_plugins = ("tiny_fixtures",)

SHORT = GenerationConfig(max_new_tokens=6)


@pytest.fixture(params=["llama_base", "gpt2_base"])
def base(request: pytest.FixtureRequest) -> Base:
    return load_base(str(request.getfixturevalue(request.param)), "float32", "cpu")


def test_loss_and_accuracy_are_those_of_the_models_own_logits(base: Base, tmp_path: Path) -> None:
    rows = [{"prompt": q, "completion": f" {a}"} for q, a in pairs(5)]
    found = evaluate(base, DataConfig(train=str(write_jsonl(tmp_path / "d.jsonl", rows))))
    loss, right, count = 0.0, 0, 0
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        example = (
            base.renderer.chat(messages)[0]
            if base.renderer.template
            else base.renderer.completion(row["prompt"], row["completion"])
        )
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([example.token_ids])).logits[0].double()
        for at in (i for i, s in enumerate(example.supervised) if s):
            loss -= float(logits[at - 1].log_softmax(-1)[example.token_ids[at]])
            right += int(logits[at - 1].argmax()) == example.token_ids[at]
            count += 1
    assert found["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert found["token_accuracy"] == right / count
    assert (found["tokens"], found["examples"]) == (count, 5)


def test_exact_match_counts_the_answers_that_are_the_models_own(base: Base, tmp_path: Path) -> None:
    """Two answers are put into the data as the model gives them, one with white space around it; a third is wrong."""
    asked = [q for q, _ in pairs(3)]
    given = answers(base, [[{"role": "user", "content": q}] for q in asked], SHORT)
    rows = [{"prompt": q, "completion": c} for q, c in zip(asked, [given[0], f" {given[1]}\n", "no"], strict=True)]
    found = exact_match(base, DataConfig(train=str(write_jsonl(tmp_path / "d.jsonl", rows))), SHORT)
    assert found == {"exact_match": pytest.approx(2 / 3), "generated": 3}


def test_a_system_message_reaches_the_evaluation(llama_base: Path, tmp_path: Path) -> None:
    base = load_base(str(llama_base), "float32", "cpu")
    data = str(write_jsonl(tmp_path / "d.jsonl", [{"prompt": q, "completion": a} for q, a in pairs(3)]))
    plain, told = (evaluate(base, DataConfig(train=data, system=s)) for s in (None, "answer at once"))
    assert plain["loss"] != told["loss"]
    assert plain["tokens"] == told["tokens"]


def test_data_without_answers_cannot_be_matched(base: Base, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "t.jsonl", [{"text": "nothing asked"}])
    with pytest.raises(DataError, match="plain text, which has no answers to match"):
        exact_match(base, DataConfig(train=str(text)), SHORT)
    calling = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}])
    with pytest.raises(DataError, match="has tools, and answers are generated without them"):
        exact_match(base, DataConfig(train=str(calling)), SHORT)
    asked = write_jsonl(tmp_path / "m.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    with pytest.raises(DataError, match="no answers"):
        exact_match(base, DataConfig(train=str(asked)), SHORT)
