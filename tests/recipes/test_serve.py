"""What a base is loaded as for serving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from twofold import events
from twofold.base import load
from twofold.engine.cache import SlotCache
from twofold.engine.request import Request
from twofold.errors import ConfigError
from twofold.recipes.serve import ServeConfig, load_served

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture(autouse=True)
def _multiplies_float32_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "fastest_dtype", lambda device: torch.float32)


def test_our_kernels_decode_bfloat16_also_where_float32_multiplies_faster(wide_base: Path) -> None:
    served = load_served(ServeConfig(base=str(wide_base)))
    assert served.scheduler.path.startswith("our own kernels")
    found = served.base.model.state_dict() | dict(served.base.model.named_buffers())
    expected = load.load_base(str(wide_base), "bfloat16").model
    for name, tensor in (expected.state_dict() | dict(expected.named_buffers())).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_what_pytorch_decodes_stays_in_the_faster_type(gpt2_base: Path) -> None:
    served = load_served(ServeConfig(base=str(gpt2_base)))
    assert served.base.dtype == torch.float32


def test_a_type_that_is_asked_for_is_kept(wide_base: Path) -> None:
    served = load_served(ServeConfig(base=str(wide_base), dtype="float32"))
    assert served.base.dtype == torch.float32


def test_our_kernels_decode_a_packed_base_in_the_type_it_was_packed_in(wide_base: Path) -> None:
    served = load_served(ServeConfig(base=str(wide_base), quantization="int8"))
    assert served.scheduler.path.startswith("our own kernels")
    assert served.base.dtype == torch.float32


@pytest.mark.parametrize("on", [True, False])
def test_the_prefix_cache_can_be_turned_off(wide_base: Path, monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    scheduler = load_served(ServeConfig(base=str(wide_base), streams=1, prefix_cache=on)).scheduler
    forward, read = scheduler._forward, []
    monkeypatch.setattr(
        forward, "run", lambda parts, inner=forward.run: read.append(sum(len(p.tokens) for p in parts)) or inner(parts)
    )
    for _ in range(2):
        scheduler.add(Request(token_ids=list(range(4, 34)), max_new_tokens=1))
        scheduler.step()
    assert read == [30, 1 if on else 30]


# ---------------------------------------------------------------------------------------------- memory of the cache

SLOT = 2 * 2 * 2 * 16 * 2 * 100
"""Bytes of 100 tokens of `wide_base` in bfloat16: keys and values of two layers, of two heads of 16 numbers."""


def streams_of(config: ServeConfig) -> tuple[int, int, list[str]]:
    """Slots that were made, their bytes, and what was warned of."""
    told: list[events.Event] = []
    scheduler = load_served(config, told.append).scheduler
    slots = scheduler._forward.slots
    assert isinstance(slots, SlotCache)
    warned = [event.text for event in told if isinstance(event, events.Warned)]
    return scheduler.slots, slots.keys.nbytes + slots.values.nbytes, warned


def test_without_a_bound_there_are_as_many_streams_as_asked_for(wide_base: Path) -> None:
    assert streams_of(ServeConfig(base=str(wide_base), streams=5, context=100)) == (5, 5 * SLOT, [])


@pytest.mark.parametrize(("slots", "made"), [(5, 5), (100, 5), (4.99, 4), (1, 1)])
def test_fewer_streams_are_made_where_their_cache_is_above_the_bound(wide_base: Path, slots: float, made: int) -> None:
    config = ServeConfig(base=str(wide_base), streams=5, context=100, cache_memory_mb=slots * SLOT / 1e6)
    found, held, warned = streams_of(config)
    assert (found, held) == (made, made * SLOT)
    assert len(warned) == (made < 5)
    assert all(f"{made} streams instead of 5" in text and "--cache-memory-mb" in text for text in warned)


def test_a_cache_without_room_for_one_stream_is_refused(wide_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"one stream of 100 tokens .* more than .* --cache-memory-mb"):
        load_served(ServeConfig(base=str(wide_base), context=100, cache_memory_mb=0.99 * SLOT / 1e6))
    with pytest.raises(ConfigError, match=r"cache_memory_mb is 0\.0 but must be above 0"):
        ServeConfig(cache_memory_mb=0.0)


def test_what_a_models_own_forward_keeps_cannot_be_bounded(gpt2_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"own forward .* leave out --cache-memory-mb"):
        load_served(ServeConfig(base=str(gpt2_base), cache_memory_mb=1.0))
