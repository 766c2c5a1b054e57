"""The engine: every stream says what transformers' own generation says for that prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import VOCABULARY, build_model
from torch._subclasses.fake_tensor import FakeTensorMode

from twofold.adapter.attach import activate, attach, disabled, merge, unmerge
from twofold.adapter.config import LoraConfig
from twofold.base.blocks import Decoder, describe
from twofold.engine.answering import answer_tokens
from twofold.engine.decoder import BlockForward
from twofold.engine.engine import Engine
from twofold.engine.request import Completion, Request, Sampling
from twofold.engine.scheduler import Scheduler
from twofold.engine.step import Part
from twofold.errors import AnswerError

BLOCKS = ("llama", "llama-tied", "qwen2", "qwen3", "mistral")
OTHERS = ("gpt2", "opt")
FAMILIES = pytest.mark.parametrize("family", [*BLOCKS, *OTHERS])


def prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


MIXED = prompts(1, 9, 4, 17, 2)


def sharp(family: str) -> Any:
    """A model whose greedy answers are no ties: its logits are spread wide."""
    model = build_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def adapted(family: str, *names: str) -> Any:
    model = sharp(family)
    for i, name in enumerate(names):
        attach(model, LoraConfig(r=4), name)
        generator = torch.Generator().manual_seed(20 + i)
        for n, p in model.named_parameters():
            if n.endswith(f"{name}.B"):
                p.data = torch.randn(p.shape, generator=generator) * 0.3
    return model


def requests(texts: Sequence[list[int]], new: int = 8, **more: Any) -> list[Request]:
    return [Request(token_ids=t, max_new_tokens=new, **more) for t in texts]


def greedy(model: Any, prompt: list[int], new: int = 8) -> list[int]:
    """transformers' own generation, this prompt alone."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, **settings)
    made: list[int] = found[0, len(prompt) :].tolist()
    return made


def made(model: Any, texts: Sequence[list[int]], new: int = 8, streams: int = 32) -> list[list[int]]:
    return [c.token_ids for c in Engine(model, streams).generate(requests(texts, new))]


# ---------------------------------------------------------------------------------------------- what is said


@FAMILIES
def test_every_stream_says_what_transformers_says_alone(family: str) -> None:
    model = sharp(family)
    expected = [greedy(model, p) for p in MIXED]
    assert len({tuple(e) for e in expected}) > 1
    assert made(model, MIXED) == expected
    assert ("the model's own forward" in Scheduler(model).path) == (family in OTHERS)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_with_adapters_active_weighted_merged_and_off(family: str) -> None:
    model = adapted(family, "one", "two")
    bare = made(sharp(family), MIXED)
    said = []
    for weights in ({"one": 1.0}, {"two": 1.0}, {"one": 0.5, "two": 0.8}):
        activate(model, weights)
        said.append(made(model, MIXED))
        assert said[-1] == [greedy(model, p) for p in MIXED]
        merge(model)
        assert made(model, MIXED) == said[-1]
        unmerge(model)
    assert len({str(s) for s in (*said, bare)}) == 4
    with disabled(model):
        assert made(model, MIXED) == bare


def test_more_requests_than_streams_come_back_in_their_order() -> None:
    model = sharp("llama")
    assert made(model, MIXED, streams=2) == [greedy(model, p) for p in MIXED]
    assert Engine(model).generate([]) == []


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_streams_that_finish_do_not_disturb_the_others(family: str) -> None:
    """Of eight streams six end early, one after another, so that slots ride along and are dropped."""
    model, texts = sharp(family), prompts(3, 8, 5, 2, 7, 6, 4, 9)
    news = [1, 2, 12, 3, 1, 9, 4, 12]
    asked = [Request(token_ids=t, max_new_tokens=n) for t, n in zip(texts, news, strict=True)]
    found = Engine(model).generate(asked)
    assert [c.token_ids for c in found] == [greedy(model, t, 12)[:n] for t, n in zip(texts, news, strict=True)]
    assert {c.finish_reason for c in found} == {"length"}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_stop_tokens_end_an_answer_and_are_not_part_of_it(family: str) -> None:
    model = sharp(family)
    alone = [greedy(model, p) for p in MIXED]
    stop = alone[1][3]
    found = Engine(model).generate(requests(MIXED, stop_ids=(stop,)))
    for said, whole in zip(found, alone, strict=True):
        at = whole.index(stop) if stop in whole else len(whole)
        assert said == Completion(token_ids=whole[:at], finish_reason="stop" if at < len(whole) else "length")
    assert found[1].finish_reason == "stop"
    assert len(Engine(model).generate(requests(MIXED[:1], stop_ids=(alone[0][0],)))[0].token_ids) == 0


@FAMILIES
def test_a_streamed_answer_is_the_generated_one(family: str) -> None:
    model = adapted(family, "one")
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=4)):
        for request in requests(MIXED[:3], sampling=sampling):
            (whole,) = Engine(model).generate([request])
            assert list(Engine(model).stream(request)) == whole.token_ids
    stop = Engine(model).generate(requests(MIXED[1:2]))[0].token_ids[2]
    request = Request(token_ids=MIXED[1], max_new_tokens=8, stop_ids=(stop,))
    assert list(Engine(model).stream(request)) == Engine(model).generate([request])[0].token_ids


# ---------------------------------------------------------------------------------------------- sampling


def test_a_seeded_stream_does_not_depend_on_its_neighbours() -> None:
    model = sharp("llama")
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.95, seed=11)
    mine = Request(token_ids=MIXED[1], max_new_tokens=10, sampling=sampling)
    alone = Engine(model).generate([mine])[0].token_ids
    assert alone != greedy(model, MIXED[1], 10)
    others = requests(prompts(4, 20, 3, seed=8), 5, sampling=Sampling(temperature=2.0, seed=3))
    for batch in ([mine, *others], [*others, mine], [others[0], mine]):
        assert Engine(model).generate(batch)[batch.index(mine)].token_ids == alone
    again = Request(token_ids=MIXED[1], max_new_tokens=10, sampling=Sampling(temperature=1.5, top_k=20, seed=12))
    assert Engine(model).generate([again])[0].token_ids != alone


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    model = sharp("llama")
    found = Engine(model).generate(requests(MIXED, sampling=Sampling(temperature=3.0, top_k=1, seed=9)))
    assert [c.token_ids for c in found] == [greedy(model, p) for p in MIXED]


# ---------------------------------------------------------------------------------------------- on a GPU that is not there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "smollm3"])
def test_nothing_is_left_on_the_cpu(dtype: torch.dtype, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors on another device refuse to meet any of the CPU; values that Python reads stand in for them."""
    device = torch.device("cuda:0" if torch.backends.cuda.is_built() else "lazy:0")
    with FakeTensorMode(allow_non_fake_inputs=True):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = build_model(family)
        finally:
            torch.set_default_dtype(before)
        attach(model, LoraConfig(r=4, target_modules="all-linear"))
        described = describe(model)
        assert isinstance(described, Decoder)
        forward = BlockForward(model, described, 3, 30, reuse=False, native=True)
        assert forward.path == "PyTorch's operations, not our own kernels: the base is not on the CPU"
        first = forward.run([Part(i, 0, tokens, (), asked=True) for i, tokens in enumerate(MIXED[:3])])
        assert first.device == device
        assert first.shape == (3, VOCABULARY)
        assert first.dtype == dtype
        then = forward.run([Part(i, len(tokens), [5], (), asked=i != 1) for i, tokens in enumerate(MIXED[:3])])
        assert then.device == device
        assert then.shape == (2, VOCABULARY)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_numbers_overflow_says_so_and_answers_nothing(temperature: float) -> None:
    model, asked = sharp("llama"), requests(prompts(4, 6), sampling=Sampling(temperature=temperature))
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(AnswerError, match="logits are not finite numbers"):
        Engine(model).generate(asked)
    with pytest.raises(AnswerError, match="logits are not finite numbers"):
        list(Engine(model).stream(asked[0]))
    model = build_model("t5")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(AnswerError, match="logits are not finite numbers"):
        list(answer_tokens(model, asked[0]))
