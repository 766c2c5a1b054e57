"""Mixed batches: whatever comes and goes beside it, a row says what PEFT says of it alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import VOCABULARY
from hypothesis import given
from hypothesis import strategies as st
from tiny_engine import FAMILIES, alone, prompt, run, sharp

from twofold.adapter.attach import attach, merge
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.engine.request import Request
from twofold.engine.scheduler import Ended, Made, Scheduler
from twofold.errors import AdapterFileError, ConfigError

pytest_plugins = ("tiny_engine",)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_row_of_a_mixed_batch_says_what_peft_says_alone(family: str, native: bool, written: Any) -> None:
    """Every variant in one batch with bare rows, prompts longer and shorter than a chunk, more requests than slots."""
    folders = written(family)
    scheduler = Scheduler(sharp(family), streams=5, capacity=120, chunk=40, native=native)
    assert scheduler.path.startswith(
        "our own" if native and family != "gpt2" else "PyTorch" if family != "gpt2" else "the model"
    )
    for name, folder in folders.items():
        scheduler.put_adapter(name, folder)
    wanted = [
        (n, prompt(length, i))
        for i, (n, length) in enumerate(zip([None, *folders, None], [3, 50, 9, 1, 33, 70, 5, 12, 90], strict=False))
    ]
    requests = [Request(token_ids=p, max_new_tokens=7, adapters={n: 1.0} if n else {}) for n, p in wanted]
    said = run(scheduler, requests)
    assert said == [alone(sharp(family), folders[n] if n else None, p, 7) for n, p in wanted]
    assert len({tuple(s) for s in said}) > 1


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_that_are_trained_whole_count_in_the_tied_head_too(family: str, native: bool, tmp_path: Path) -> None:
    """Half of the vocabulary, so that answers are full of them; merged as well."""
    model, text = sharp(family), prompt(9, 4)
    attach(model, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=list(range(0, VOCABULARY, 2))))
    generator = torch.Generator().manual_seed(3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_adapter(model, tmp_path / "tokens")
    expected = alone(sharp(family), tmp_path / "tokens", text, 12)
    assert alone(model, None, text, 12) == expected
    for change in (lambda: None, lambda: merge(model)):
        change()
        scheduler = Scheduler(model, streams=2, capacity=40, native=native)
        assert not scheduler.path.startswith("the model")
        assert run(scheduler, [Request(token_ids=text, max_new_tokens=12)]) == [expected]


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_a_head_that_is_stretched_or_shifted_waits_while_its_prompt_is_read(
    variant: str, native: bool, tmp_path: Path
) -> None:
    """Beside a stream that is asked already."""
    model = sharp("qwen2")
    attach(model, LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"], **{variant: True}))
    generator = torch.Generator().manual_seed(3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_adapter(model, tmp_path / "head")
    scheduler = Scheduler(sharp("qwen2"), streams=2, capacity=60, chunk=16, native=native)
    scheduler.put_adapter("head", tmp_path / "head")
    bare = Request(token_ids=prompt(2, 1), max_new_tokens=9)
    long = Request(token_ids=prompt(40, 2), max_new_tokens=5, adapters={"head": 1.0})
    expected = [
        alone(sharp("qwen2"), f, r.token_ids, r.max_new_tokens) for f, r in ((None, bare), (tmp_path / "head", long))
    ]
    assert run(scheduler, [bare, long]) == expected


@pytest.mark.parametrize("weights", [(0.5, -1.5), (2, -1)])
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_a_row_may_have_several_adapters_with_weights(
    native: bool, weights: tuple[float | int, float | int], written: Any
) -> None:
    folders, model, text = written("llama"), sharp("llama"), prompt(9, 1)
    scheduler = Scheduler(sharp("llama"), streams=4, capacity=40, native=native)
    for name in ("plain", "rs", "biased", "dora"):
        scheduler.put_adapter(name, folders[name])
    theirs = peft.PeftModel.from_pretrained(model, str(folders["plain"]), "plain").eval()
    theirs.load_adapter(str(folders["rs"]), "rs")
    for module in (m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
        module.set_scale("plain", weights[0])
        module.set_scale("rs", weights[1])
    theirs.base_model.set_adapter(["plain", "rs"])
    both = Request(token_ids=text, max_new_tokens=6, adapters={"plain": weights[0], "rs": weights[1]})
    bare = Request(token_ids=text, max_new_tokens=6, adapters={"plain": 0})
    found = run(scheduler, [both, bare])
    expected = theirs.generate(
        input_ids=torch.tensor([text]),
        do_sample=False,
        max_new_tokens=6,
        min_new_tokens=6,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert found == [expected[0, 9:].tolist(), alone(sharp("llama"), None, text, 6)]
    for wrong in ({"dora": 0.5}, {"dora": 1.0, "plain": 1.0}):
        with pytest.raises(ConfigError, match="'dora' is DoRA"):
            scheduler.add(Request(token_ids=text, adapters=wrong, max_new_tokens=3))


@pytest.fixture(scope="module")
def busy(written: Any) -> tuple[Scheduler, list[tuple[str | None, list[int], list[int]]]]:
    """A scheduler, and what some requests get from a fresh one, one at a time."""
    folders, model = written("llama"), sharp("llama")
    schedulers = [Scheduler(model, streams=3, capacity=60, chunk=16, reuse=reuse) for reuse in (True, False)]
    for scheduler in schedulers:
        for name, folder in folders.items():
            scheduler.put_adapter(name, folder)
    common = prompt(20, 99)
    known = []
    for i in range(12):
        name = random.Random(i).choice([None, *folders])
        text = common[: random.Random(i).randint(0, 20)] + prompt(random.Random(-i).randint(1, 20), i)
        known.append(
            (
                name,
                text,
                run(schedulers[1], [Request(token_ids=text, max_new_tokens=8, adapters={name: 1.0} if name else {})])[
                    0
                ],
            )
        )
    return schedulers[0], known


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 4), st.booleans()), min_size=1, max_size=9))
def test_whoever_comes_and_goes_a_request_gets_the_same_answer(busy: Any, plan: list[tuple[int, int, bool]]) -> None:
    """Random arrivals between the steps, some cancelled under way, prefixes taken over from earlier streams."""
    scheduler, known = busy
    said: dict[int, list[int]] = {}
    wanted, ended, cancelled = {}, {}, set()
    waiting = list(plan)
    while waiting or not scheduler.idle:
        if waiting:
            which, steps, cancel = waiting.pop(0)
            name, text, _ = known[which]
            number = scheduler.add(Request(token_ids=text, max_new_tokens=8, adapters={name: 1.0} if name else {}))
            said[number], wanted[number] = [], which
        else:
            steps, cancel = 1, False
        for step in range(steps):
            for event in scheduler.step():
                if isinstance(event, Made):
                    said[event.stream].append(event.token)
                else:
                    ended[event.stream] = event.reason
            if cancel and step == 0:
                scheduler.cancel(number)
                cancelled.add(number)
    assert scheduler.cache_used == 0
    for number, which in wanted.items():
        expected = known[which][2]
        if ended[number] == "length":
            assert said[number] == expected
        else:
            assert number in cancelled
            assert ended[number] == "cancelled"
            assert said[number] == expected[: len(said[number])]


def test_a_prefix_is_taken_over_only_under_the_same_adapters(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(sharp("llama"), streams=4, capacity=60)
    for name in ("plain", "rs"):
        scheduler.put_adapter(name, written("llama")[name])
    text, read = prompt(30, 5), []
    forward = scheduler._forward
    monkeypatch.setattr(
        forward, "run", lambda parts, inner=forward.run: read.append(sum(len(p.tokens) for p in parts)) or inner(parts)
    )
    said = []
    for adapters in ({"plain": 1.0}, {"plain": 1.0}, {"rs": 1.0}, {"plain": 0.5}, {}, {"plain": 1.0}):
        read.clear()
        said.append(run(scheduler, [Request(token_ids=text, max_new_tokens=3, adapters=adapters)])[0])
        assert read[0] == (1 if len(said) in (2, 6) else 30), len(said)
    assert said[0] == said[1] == said[5]
    scheduler.drop_adapter("plain")
    scheduler.put_adapter("plain", written("llama")["biased"])
    read.clear()
    run(scheduler, [Request(token_ids=text, max_new_tokens=3, adapters={"plain": 1.0})])
    assert read[0] == 30


def test_a_prompt_that_many_ask_at_once_is_read_once(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who ask the same wait for it, even if the first of them leaves; nobody else does."""
    scheduler, read = Scheduler(sharp("llama"), streams=6, capacity=60, chunk=16), []
    scheduler.put_adapter("plain", written("llama")["plain"])
    forward = scheduler._forward
    monkeypatch.setattr(
        forward, "run", lambda parts, inner=forward.run: read.append([len(p.tokens) for p in parts]) or inner(parts)
    )
    texts = [prompt(30, 1)] * 4 + [prompt(5, 2)]
    requests = [Request(token_ids=text, max_new_tokens=3) for text in texts]
    other = Request(token_ids=texts[0], max_new_tokens=3, adapters={"plain": 1.0})
    expected = [alone(sharp("llama"), None, text, 3) for text in texts]
    assert run(scheduler, [*requests, other])[:-1] == expected
    assert sum(map(sum, read)) == 30 + 3 + 5 + 30 + 6 * 2
    fresh = Request(token_ids=prompt(30, 3), max_new_tokens=3)
    first, *_ = (scheduler.add(fresh) for _ in range(3))
    scheduler.step()
    scheduler.cancel(first)
    ended = [event for _ in range(8) for event in scheduler.step() if isinstance(event, Ended)]
    assert [event.reason for event in ended] == ["cancelled", "length", "length"]


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_a_stream_that_overflowed_spoils_nobody_who_has_its_slot_after_it(native: bool, tmp_path: Path) -> None:
    """Longer than those after it, which run side by side, so that what it left lies behind the end of the shorter one."""
    model = sharp("llama")
    attach(model, LoraConfig(r=4, target_modules=["v_proj"]))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.fill_(1e30)
    save_adapter(model, tmp_path / "loud")
    for dropped in (False, True):
        scheduler = Scheduler(sharp("llama"), streams=2, capacity=80, native=native)
        scheduler.put_adapter("loud", tmp_path / "loud")
        run(scheduler, [Request(token_ids=prompt(60, i), max_new_tokens=9, adapters={"loud": 1.0}) for i in (1, 2)])
        if dropped:
            scheduler.drop_adapter("loud")
        after = [Request(token_ids=prompt(length, length), max_new_tokens=6) for length in (5, 40)]
        assert run(scheduler, after) == [alone(sharp("llama"), None, r.token_ids, 6) for r in after]


def test_what_cannot_be_served_is_refused_in_a_sentence(written: Any, tmp_path: Path) -> None:
    scheduler = Scheduler(sharp("llama"), streams=2, capacity=20)
    scheduler.put_adapter("plain", written("llama")["plain"])
    with pytest.raises(ConfigError, match="an adapter 'plain' is loaded already"):
        scheduler.put_adapter("plain", written("llama")["rs"])
    with pytest.raises(ConfigError, match=r"no adapter 'plane' is loaded.*plain"):
        scheduler.add(Request(token_ids=[5], max_new_tokens=3, adapters={"plane": 1.0}))
    with pytest.raises(ConfigError, match="15 tokens and 6 new ones are more than the 20"):
        scheduler.add(Request(token_ids=prompt(15, 0), max_new_tokens=6))
    number = scheduler.add(Request(token_ids=[5], max_new_tokens=3, adapters={"plain": 1.0}))
    assert scheduler.users("plain") == 1
    with pytest.raises(ConfigError, match="used by 1 streams"):
        scheduler.drop_adapter("plain")
    scheduler.cancel(number)
    assert scheduler.step() == [Ended(number, "cancelled")]
    scheduler.cancel(number)
    scheduler.drop_adapter("plain")
    with pytest.raises(ConfigError, match="no adapter 'plain'"):
        scheduler.drop_adapter("plain")
    model = sharp("llama")
    attach(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    save_adapter(model, tmp_path / "whole")
    with pytest.raises(AdapterFileError, match="whole copy"):
        scheduler.put_adapter("whole", tmp_path / "whole")
