"""The floor under a step has the matrix products that a step really runs: neither more nor fewer operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DESCRIBED, VOCABULARY, build_model
from torch.utils.flop_counter import FlopCounterMode

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.base.batch import Example, PackedBatch, pack
from twofold.base.blocks import Decoder, describe
from twofold.functional import attention
from twofold.functional.loss import ROW_MULTIPLE
from twofold.training import floor
from twofold.training.floor import floor_seconds
from twofold.training.objective import FastObjective


def a_batch() -> PackedBatch:
    """Examples, three of which begin alike, with as many supervised tokens as the head takes without filling up."""
    draw = torch.Generator().manual_seed(2)

    def tokens(count: int) -> list[int]:
        return torch.randint(4, VOCABULARY, (count,), generator=draw).tolist()

    beginning = tokens(14)
    texts = [[*beginning, *tokens(n)] for n in (9, 8, 3)] + [tokens(n) for n in (30, 12)]
    supervised = [8, 7, 2, 10, 5]
    assert sum(supervised) == ROW_MULTIPLE
    examples = [
        Example(t, [len(t) - count <= i for i in range(len(t))]) for t, count in zip(texts, supervised, strict=True)
    ]
    return pack(examples)


def in_place(total: Any, a: tuple[int, int], b: tuple[int, int], **_: Any) -> int:
    """Operations of `total.addmm_(a, b)`, which PyTorch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})


def decoder_of(family: str, **settings: Any) -> Decoder:
    model = build_model(family)
    attach(model, LoraConfig(r=4, **settings))
    found = describe(model.train())
    assert isinstance(found, Decoder)
    return found


def operations_of_a_step(decoder: Decoder, batch: PackedBatch, *, share: bool) -> int:
    """Those of a forward and a backward pass; without the outer product that makes angles of positions."""
    with counter() as counted:
        FastObjective(decoder, recompute=False, share_prefixes=share)(batch).loss_sum.backward()
    with counter() as turning:
        layout = floor.lay_out(batch, share=share)
        decoder.angles(torch.empty(0), layout.positions)
    return counted.get_total_flops() - turning.get_total_flops()


def operations_of_the_floor(
    decoder: Decoder, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch, *, share: bool
) -> int:
    """Those of one round, which are the same in whatever way attention is made."""
    monkeypatch.setattr(floor, "ROUNDS", 1)
    found = set()
    for way in floor.WAYS:
        with monkeypatch.context() as only, counter() as counted:
            only.setattr(floor, "WAYS", (way,))
            assert floor_seconds(decoder, [batch], share=share) > 0
        found.add(counted.get_total_flops())
    (count,) = found
    return count


@pytest.mark.parametrize("family", DESCRIBED)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("keep", [0, 512], ids=["computed again", "kept"])
def test_the_floor_has_the_operations_of_a_step(
    family: str, share: bool, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "KEEP_UP_TO", keep)
    decoder, batch = decoder_of(family), a_batch()
    expected = operations_of_a_step(decoder, batch, share=share)
    assert operations_of_the_floor(decoder, batch, monkeypatch, share=share) == expected


@pytest.mark.parametrize(
    "target", ["attention", "mlp", ("v_proj",), ("down_proj",), ("q_proj", "embed_tokens")], ids=str
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_whatever_is_adapted(target: Any, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the lowest projection that learns a step runs no backward, and the floor has none either."""
    decoder, batch = decoder_of("llama", target_modules=target, lora_dropout=dropout), a_batch()
    expected = operations_of_a_step(decoder, batch, share=True)
    found = operations_of_the_floor(decoder, batch, monkeypatch, share=True)
    assert found == pytest.approx(expected, rel=0.02 if "embed_tokens" in target else 0)


def test_layers_below_the_lowest_adapted_one_run_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, batch = decoder_of("llama", target_modules=r".*\.1\.mlp\.up_proj"), a_batch()
    expected = operations_of_a_step(decoder, batch, share=True)
    assert operations_of_the_floor(decoder, batch, monkeypatch, share=True) == expected
