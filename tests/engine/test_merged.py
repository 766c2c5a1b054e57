"""Adapters folded into a second copy of the weights: what rows say, and when they say it over which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import VOCABULARY, build_model
from wide_families import differs, said, sharp

from twofold.adapter.attach import attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.engine.request import Request, Sampling
from twofold.engine.scheduler import Made, Scheduler
from twofold.errors import ConfigError

EXACT = 1e-3
"""Of log-probabilities in float32, of models whose logits go into the tens."""
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": "all-linear"},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "biased": {"r": 2, "lora_bias": True, "target_modules": ["k_proj", "up_proj", "o_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "gate_proj", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, model = tmp_path_factory.mktemp("adapters"), sharp("qwen2")
    for i, (name, config) in enumerate(ADAPTERS.items()):
        attach(model, LoraConfig(**{"lora_alpha": 8} | config))
        generator = torch.Generator().manual_seed(i)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        save_adapter(model, root / name)
        detach(model)
    return {name: root / name for name in ADAPTERS}


def engine(folders: dict[str, Path], **more: Any) -> Scheduler:
    scheduler = Scheduler(sharp("qwen2"), streams=3, capacity=120, **{"merge_after": 3} | more)
    for name, folder in folders.items():
        scheduler.put_adapter(name, folder)
    return scheduler


def asked(adapter: str | None, seed: int, new: int = 40) -> Request:
    tokens = torch.randint(4, VOCABULARY, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    worn = {adapter: 1.0} if adapter else {}
    return Request(token_ids=tokens, max_new_tokens=new, adapters=worn, sampling=Sampling(logprobs=0))


def theirs(folder: Path | None, *, merge: bool = True) -> Any:
    """PEFT's model with the adapter merged."""
    model = sharp("qwen2")
    if folder is None:
        return model
    model = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    return model.merge_and_unload() if merge else model


def run(scheduler: Scheduler) -> list[Any]:
    events: list[Any] = []
    while not scheduler.idle:
        events += scheduler.step()
    return events


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_what_is_folded_in_says_what_the_merged_model_says(name: str, folders: dict[str, Path]) -> None:
    scheduler, merged = engine(folders), theirs(folders[name], merge=name != "biased")
    for seed in (1, 2):  # the second one from its first pass on
        stream = scheduler.add(asked(name, seed))
        answer = said(run(scheduler), stream)
        assert scheduler.merged == (name,)
        assert differs(merged, asked(name, seed).token_ids, answer) < EXACT
        assert differs(theirs(None), asked(name, seed).token_ids, answer) > 100 * EXACT


def test_whoever_comes_beside_it_is_answered_at_once_and_the_weights_stay(folders: dict[str, Path]) -> None:
    scheduler, first = engine(folders), asked("plain", 3, 50)
    mine, events = scheduler.add(first), []
    while not scheduler.merged:
        events += scheduler.step()
    others = {scheduler.add(asked(name, 4, 8)): name for name in (None, "dora")}
    after = scheduler.step()
    assert {e.stream for e in after if isinstance(e, Made)} == {mine, *others}
    events += after + run(scheduler)
    assert scheduler.merged == ("plain",)
    assert differs(theirs(folders["plain"]), first.token_ids, said(events, mine)) < EXACT
    for stream, name in others.items():
        model = theirs(folders[name] if name else None)
        assert differs(model, asked(name, 4).token_ids, said(events, stream)) < EXACT


def test_the_next_one_takes_its_place_and_what_is_dropped_goes(folders: dict[str, Path]) -> None:
    scheduler = engine(folders)
    for name in ("plain", "dora"):
        scheduler.add(asked(name, 5))
        run(scheduler)
        assert scheduler.merged == (name,)
    scheduler.drop_adapter("dora")
    assert scheduler.merged == ()


def test_nothing_is_folded_in_unasked_or_into_eight_bits(folders: dict[str, Path]) -> None:
    scheduler = engine(folders, merge_after=None)
    scheduler.add(asked("plain", 6))
    run(scheduler)
    assert scheduler.merged == ()
    with pytest.raises(ConfigError, match="never merged into weights in eight bits"):
        engine(folders, weights="int8")


@pytest.mark.parametrize(
    ("family", "native", "said"), [("qwen2", False, "not asked for"), ("gpt2", True, "own forward")]
)
def test_where_nothing_can_merge_them_that_is_said(family: str, native: bool, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"{said}.*leave out merge_after"):
        Scheduler(build_model(family), streams=1, capacity=20, native=native, merge_after=2)
