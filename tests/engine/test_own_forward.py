"""Models that the scheduler runs by their own forward: every row says what PEFT says of it alone, or its adapter is refused."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import GROUPED
from tiny_engine import alone, prompt, run, sharp

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.engine.request import Request
from twofold.engine.scheduler import Ended, Scheduler
from twofold.errors import AdapterFileError, ConfigError

pytest_plugins = ("tiny_engine",)


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_a_models_own_forward_begins_every_request_anew(streams: int, written: Any) -> None:
    """More requests than slots, which end at different steps and leave their slots to the next in the same pass."""
    folders = written("gpt2")
    scheduler = Scheduler(sharp("gpt2"), streams=streams, capacity=40)
    scheduler.put_adapter("plain", folders["plain"])
    wanted = [(None if i % 3 else "plain", prompt(4 + 5 * i % 11, i), 3 + 4 * i % 9) for i in range(7)]
    expected = [alone(sharp("gpt2"), folders[n] if n else None, p, new) for n, p, new in wanted]
    requests = [Request(token_ids=p, max_new_tokens=new, adapters={n: 1.0} if n else {}) for n, p, new in wanted]
    assert run(scheduler, requests) == expected
    assert [run(scheduler, [r])[0] for r in requests] == expected


def test_a_models_own_forward_takes_adapters_whose_names_have_dots(written: Any) -> None:
    folders = written("gpt2")
    scheduler = Scheduler(sharp("gpt2"), streams=2, capacity=40)
    names = {"v1.2@00000000": "plain", "v1@2@00000000": "few"}
    for name, folder in names.items():
        scheduler.put_adapter(name, folders[folder])
    asked = [Request(token_ids=prompt(9, 3), max_new_tokens=6, adapters={name: 1.0}) for name in names]
    assert run(scheduler, asked) == [alone(sharp("gpt2"), folders[f], prompt(9, 3), 6) for f in names.values()]
    for name in names:
        assert scheduler.adapter_bytes(name) > 0
        scheduler.drop_adapter(name)


def test_a_models_own_forward_keeps_no_more_than_its_streams_have() -> None:
    """Streams that overlap without an end: the places of those that have ended are not carried on."""
    model, widths, held = sharp("gpt2"), [], []

    def look(_: Any, __: Any, named: dict[str, Any]) -> None:
        widths.append(named["attention_mask"].shape[1])
        held.append(weakref.ref(named["past_key_values"]))

    model.register_forward_pre_hook(look, with_kwargs=True)
    scheduler = Scheduler(model, streams=2, capacity=40, chunk=8)
    for i in range(12):
        scheduler.add(Request(token_ids=prompt(6, i), max_new_tokens=9))
        for _ in range(5):
            scheduler.step()
    half_read = scheduler.add(Request(token_ids=prompt(20, 1), max_new_tokens=9))
    while scheduler.waiting:
        scheduler.step()
    scheduler.cancel(half_read)
    while not scheduler.idle:
        scheduler.step()
    gc.collect()
    assert 6 < max(widths) < 6 + 9
    assert not any(cache() for cache in held)


def test_adapters_that_do_not_add_up_are_refused_before_the_models_own_forward_meets_them(tmp_path: Path) -> None:
    wanted = {"dora": {"use_dora": True}, "whole": {"modules_to_save": ["lm_head"]}}
    scheduler = Scheduler(sharp("gpt2"), streams=3, capacity=30)
    for name, more in wanted.items():
        model = sharp("gpt2")
        attach(model, LoraConfig(r=2, target_modules=["c_attn"], **more))
        save_adapter(model, tmp_path / name)
        scheduler.put_adapter(name, tmp_path / name)
    beside = scheduler.add(Request(token_ids=[5, 6], max_new_tokens=3, adapters={"dora": 1.0}))
    for adapters, said in (
        ({"dora": 0.5}, "is DoRA"),
        ({"whole": 2.0}, "its own whole"),
        ({"dora": 1.0, "whole": 1.0}, ""),
    ):
        with pytest.raises(ConfigError, match=said):
            scheduler.add(Request(token_ids=[5], max_new_tokens=3, adapters=adapters))
    ended = [event for _ in range(4) for event in scheduler.step() if isinstance(event, Ended)]
    assert ended == [Ended(beside, "length")]


def test_an_adapter_of_a_mixtures_experts_is_refused_and_disturbs_nobody(tmp_path: Path) -> None:
    """A shared expert sees the tokens of all rows in one dimension, so that no row can have its own."""

    def mixture() -> Any:
        torch.manual_seed(3)
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**GROUPED, **sizes, shared_expert_intermediate_size=16)).eval()

    for i, (name, targets) in enumerate({"attention": ["q_proj", "v_proj"], "shared": ["up_proj", "v_proj"]}.items()):
        model = mixture()
        attach(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        generator = torch.Generator().manual_seed(i)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
        save_adapter(model, tmp_path / name)
    scheduler = Scheduler(mixture(), streams=2, capacity=30)
    scheduler.put_adapter("attention", tmp_path / "attention")
    with pytest.raises(
        AdapterFileError, match=r"/shared cannot be that of some rows.*; merge it into a base of its own"
    ):
        scheduler.put_adapter("shared", tmp_path / "shared")
    requests = [Request(token_ids=prompt(5, 2), max_new_tokens=6, adapters=a) for a in ({"attention": 1.0}, {})]
    expected = [alone(mixture(), folder, prompt(5, 2), 6) for folder in (tmp_path / "attention", None)]
    assert run(scheduler, requests) == expected
    with pytest.raises(ConfigError, match="no adapter 'shared'"):
        scheduler.add(Request(token_ids=[5], max_new_tokens=3, adapters={"shared": 1.0}))
