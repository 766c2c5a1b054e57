"""The real SmolLM2-135M-Instruct in float32, against PEFT and transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from twofold.adapter.attach import attach, detach, folding, merge, unmerge
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.base.batch import Example, PackedBatch, pack
from twofold.base.blocks import NotDescribed
from twofold.base.load import DEFAULT_BASE, Base, load_base, locate
from twofold.engine.engine import Engine
from twofold.engine.request import Request
from twofold.recipes.proof import logits_at, wide_logits
from twofold.training.objective import FastObjective, objective_for, plain_objective

QUESTIONS = ("What is the capital of France?", "Name three fruits.", "Write one short sentence about the sea.")


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(DEFAULT_BASE, "float32", "cpu")


@pytest.fixture
def adapted(base: Base) -> Any:
    """The base with an adapter on all linear layers that says something."""
    torch.manual_seed(0)
    attach(base.model, LoraConfig(r=8))
    for name, parameter in base.model.named_parameters():
        if parameter.requires_grad and name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.02)
    yield base.model
    detach(base.model)


def batch(base: Base) -> PackedBatch:
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": "Paris, of course."}] for q in QUESTIONS]
    return pack([example for talk in talks for example in base.renderer.chat(talk)])


def test_peft_reads_our_adapter_and_gives_the_same_logits(base: Base, adapted: Any, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(locate(DEFAULT_BASE), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    rows = torch.arange(batch(base).tokens)
    ours, found = (logits_at(model, batch(base), rows, 0) for model in (adapted, theirs))
    assert (ours - found).abs().max() < 2e-3
    assert torch.equal(ours.argmax(-1), found.argmax(-1))


def test_it_says_widened_weight_by_weight_what_it_says_converted_whole(base: Base, adapted: Any) -> None:
    """Apart, and folded as it runs against `merge`, in float64."""
    short = pack(base.renderer.chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]))
    rows = torch.arange(short.tokens)
    apart = wide_logits(adapted, short, rows, 0)
    with folding(adapted):
        folded = wide_logits(adapted, short, rows, 0)
    whole = copy.deepcopy(adapted)
    merge(whole)
    for layer in (m for m in whole.modules() if getattr(m, "merged", None) is not None):
        layer.merged = layer.merged.double()
    whole.double()
    torch.testing.assert_close(folded, logits_at(whole, short, rows, 0), rtol=1e-11, atol=1e-10)
    unmerge(whole)
    torch.testing.assert_close(apart, logits_at(whole, short, rows, 0), rtol=1e-11, atol=1e-10)


def test_the_fast_path_gives_the_gradients_of_the_models_own_forward(base: Base, adapted: Any) -> None:
    trained = [p for p in adapted.parameters() if p.requires_grad]
    fast = objective_for(adapted, 0, recompute=False)
    assert isinstance(fast, FastObjective)
    plain = plain_objective(adapted, 0, NotDescribed("asked for"), recompute=False)
    losses = [o(batch(base)).loss_sum for o in (fast, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(loss, trained) for loss in losses)
    assert all((a - b).norm() <= 2e-4 * b.norm() for a, b in zip(ours, theirs, strict=True))


def test_greedy_answers_are_those_of_transformers(base: Base) -> None:
    prompts = [base.renderer.chat_prompt([{"role": "user", "content": q}]) for q in QUESTIONS]
    stop = tuple(base.renderer.end_token_ids)
    found = Engine(base.model).generate([Request(token_ids=p, max_new_tokens=16, stop_ids=stop) for p in prompts])
    for prompt, completion in zip(prompts, found, strict=True):
        expected = base.model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
        assert completion.token_ids == [t for t in expected.tolist() if t not in stop]


def test_it_knows_the_capital_of_france(base: Base) -> None:
    prompt = Example(base.renderer.chat_prompt([{"role": "user", "content": QUESTIONS[0]}]), [])
    (answer,) = Engine(base.model).generate([Request(token_ids=prompt.token_ids, max_new_tokens=12, stop_ids=(2,))])
    assert "Paris" in base.tokenizer.decode(answer.token_ids)
