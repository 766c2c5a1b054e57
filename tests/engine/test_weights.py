"""Weights that the engine takes over, as they are or in eight bits: what is said, and what is left of the model."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import VOCABULARY, build_model
from torch import nn
from wide_families import WIDE_FAMILIES, Said, differs, said, sharp

from twofold.adapter.attach import attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.engine.request import Request, Sampling
from twofold.engine.scheduler import Scheduler
from twofold.errors import ConfigError, RunError
from twofold.layers.quantised import QuantisedLinear
from twofold.quant import Scheme, roundtrip

EXACT = 1e-3
"""Of log-probabilities in float32, of models whose logits go into the tens."""
FAMILIES = pytest.mark.parametrize("family", list(WIDE_FAMILIES))
NATIVE = pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])


def rounded(family: str) -> Any:
    """The same with every linear layer, and what is tied to one, as eight bits leave it."""
    model = sharp(family)
    for module in (m for m in model.modules() if isinstance(m, nn.Linear)):
        module.weight.copy_(roundtrip(module.weight, Scheme("int8")))
    return model


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def answers(scheduler: Scheduler, requests: list[Request]) -> list[Said]:
    streams, events = [scheduler.add(r) for r in requests], []
    while not scheduler.idle:
        events += scheduler.step()
    return [said(events, stream) for stream in streams]


def asked(prompt: list[int], **more: Any) -> Request:
    return Request(token_ids=prompt, max_new_tokens=8, sampling=Sampling(logprobs=0), **more)


def furthest(model: Any, texts: list[list[int]], found: list[Said]) -> float:
    return max(differs(model, text, answer) for text, answer in zip(texts, found, strict=True))


@NATIVE
@FAMILIES
def test_in_eight_bits_a_model_says_what_its_rounded_weights_say(family: str, native: bool) -> None:
    scheduler = Scheduler(sharp(family), streams=3, capacity=80, native=native, weights="int8")
    assert "eight bits" in scheduler.path
    assert scheduler.path.startswith("our own" if native else "PyTorch")
    texts = prompts(1, 9, 40, 17, 2)
    found = answers(scheduler, [asked(p) for p in texts])
    assert furthest(rounded(family), texts, found) < EXACT
    assert furthest(sharp(family), texts, found) > 5 * EXACT


@NATIVE
def test_adapters_over_eight_bits_are_not_rounded(native: bool, tmp_path: Path) -> None:
    model = sharp("llama-tied")
    for i, more in enumerate([{"r": 5}, {"r": 3, "use_dora": True}]):
        attach(model, LoraConfig(**{"target_modules": "all-linear"} | more))
        generator = torch.Generator().manual_seed(i)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        save_adapter(model, tmp_path / str(i))
        detach(model)
    scheduler = Scheduler(model, streams=3, capacity=80, native=native, weights="int8")
    for i in range(2):
        scheduler.put_adapter(str(i), tmp_path / str(i))
    texts, worn = prompts(4, 33, 7), [{"0": 1.0}, {"1": 1.0}, {}]
    found = answers(scheduler, [asked(t, adapters=w) for t, w in zip(texts, worn, strict=True)])
    for i in range(2):
        model = peft.PeftModel.from_pretrained(rounded("llama-tied"), str(tmp_path / str(i))).eval()
        assert differs(model, texts[i], found[i]) < EXACT
    assert differs(rounded("llama-tied"), texts[2], found[2]) < EXACT


@FAMILIES
def test_a_base_packed_in_eight_bits_runs_from_its_own_codes(family: str) -> None:
    model = sharp(family)
    inner = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    expected = sharp(family)
    for name, module in inner:
        model.set_submodule(name, QuantisedLinear.from_dense(module.weight, module.bias, Scheme("int8")))
        expected.get_submodule(name).weight.data = roundtrip(module.weight, Scheme("int8"))
    codes = {n: p.clone() for n, p in model.state_dict().items()}
    scheduler = Scheduler(model, streams=3, capacity=80, weights="taken")
    assert scheduler.path.startswith("our own")
    texts = prompts(3, 50)
    assert furthest(expected, texts, answers(scheduler, [asked(p) for p in texts])) < EXACT
    assert all(torch.equal(p, codes[n]) for n, p in model.state_dict().items())


@FAMILIES
def test_weights_that_were_taken_are_there_once_and_whole(family: str) -> None:
    """Freed, and unpacked to the last bit for whoever asks: files, the model's own forward, another engine."""
    model, other = sharp(family), sharp(family)
    dead = [weakref.ref(m.weight.untyped_storage()) for m in model.modules() if isinstance(m, nn.Linear)]
    scheduler = Scheduler(model, streams=2, capacity=80, weights="taken")
    assert not any(storage() for storage in dead)
    texts = prompts(9, 20)
    assert furthest(other, texts, answers(scheduler, [asked(p) for p in texts])) < EXACT
    held, expected = model.state_dict(), other.state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[n], expected[n]) for n in held)
    ids = torch.tensor(prompts(9))
    assert torch.equal(model(ids).logits, other(ids).logits)
    again = Scheduler(model, streams=2, capacity=80, weights="taken")
    assert furthest(other, texts, answers(again, [asked(p) for p in texts])) < EXACT


def test_weights_that_were_taken_cannot_be_written() -> None:
    model = sharp("llama")
    Scheduler(model, streams=2, capacity=80, weights="taken")
    for write in (lambda w: w.mul_(2), lambda w: setattr(w, "data", torch.zeros(3))):
        with pytest.raises(RunError, match="given to an engine"):
            write(model.lm_head.weight)


def test_a_model_with_a_forward_of_its_own_has_no_weights_in_eight_bits() -> None:
    with pytest.raises(ConfigError, match="no weights in eight bits"):
        Scheduler(build_model("gpt2"), streams=2, capacity=20, weights="int8")
    assert "own forward" in Scheduler(build_model("gpt2"), streams=2, capacity=20, weights="taken").path
