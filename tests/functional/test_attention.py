"""Packed and cached attention: against a loop over segments and heads in float64, with nothing seen across borders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twofold.functional import attention
from twofold.functional.attention import buckets, cached_attention, packed_attention

D = 4
SEGMENTS = [[1], [5], [3, 1, 4], [9, 8, 2, 2, 9], [16, 1, 1, 13]]
HEADS = [(2, 2), (4, 2), (3, 1)]


def qkv(rows: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(rows, h, D, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


def by_loops(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """One query at a time."""
    group, rows = q.shape[1] // k.shape[1], []
    for length in lengths:
        start = len(rows)
        for i in range(start, start + length):
            heads = []
            for h in range(q.shape[1]):
                keys, values = k[start : i + 1, h // group], v[start : i + 1, h // group]
                heads.append(torch.softmax(keys @ q[i, h] * scale, 0) @ values)
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def packed(tensors: list[Tensor], lengths: list[int], scale: float = 0.6) -> Tensor:
    return packed_attention(*tensors, buckets(lengths, "cpu"), scale)


@pytest.mark.parametrize("explicit", [0, 4, 512], ids=["fused", "both", "explicit"])
@pytest.mark.parametrize("lengths", SEGMENTS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_packed_attention_is_that_of_each_segment_alone(
    explicit: int, lengths: list[int], heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "EXPLICIT_UP_TO", explicit)
    tensors = qkv(sum(lengths), *heads)
    found, expected = packed(tensors, lengths), by_loops(*tensors, lengths, 0.6)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weights).sum(), tensors)
    theirs = torch.autograd.grad((expected * weights).sum(), tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("explicit", [0, 512], ids=["fused", "explicit"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_gradcheck(explicit: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "EXPLICIT_UP_TO", explicit)
    lengths = [3, 1, 4]
    assert torch.autograd.gradcheck(lambda *t: packed(list(t), lengths), qkv(8, *heads))


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_buckets_hold_every_row_once_and_waste_little(lengths: list[int]) -> None:
    found = buckets(lengths, "cpu")
    assert sorted(torch.cat([b.tokens for b in found]).tolist()) == list(range(sum(lengths)))
    assert sum(b.segments for b in found) == len(lengths)
    for bucket in found:
        places = bucket.gather.numel()
        assert torch.equal(bucket.gather[bucket.places], bucket.tokens)
        assert places % bucket.segments == 0
        wasted_by_rounding = bucket.segments * (attention.LENGTH_MULTIPLE - 1)
        assert bucket.tokens.numel() >= attention.BUCKET_WASTE * (places - wasted_by_rounding)


@pytest.mark.parametrize("explicit", [0, 512], ids=["fused", "explicit"])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_no_example_sees_another(explicit: int, changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other numbers in one example, even infinite ones, leave the others' outputs and gradients as they are, to the bit."""
    monkeypatch.setattr(attention, "EXPLICIT_UP_TO", explicit)
    lengths = [6, 5, 7]
    start = sum(lengths[:changed])
    inside = slice(start, start + lengths[changed])
    tensors = qkv(sum(lengths), 4, 2, torch.float32)
    others = [t.detach().clone() for t in tensors]
    for t in others:
        t[inside] = float("inf")
        t.requires_grad_()
    runs = []
    for run in (tensors, others):
        y = packed(run, lengths)
        keep = torch.ones(len(y), dtype=torch.bool)
        keep[inside] = False
        grads = torch.autograd.grad(y[keep].square().sum(), run)
        runs.append([y[keep], *(g[keep] for g in grads)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_no_query_sees_the_future() -> None:
    tensors = qkv(6, 2, 2, torch.float32)
    later = [t.detach().clone() for t in tensors]
    for t in later[1:]:
        t[4:] = 100.0
    assert torch.equal(packed(tensors, [6])[:4], packed(later, [6])[:4])


@pytest.mark.parametrize("explicit", [0, 512], ids=["fused", "explicit"])
def test_bfloat16_stays_near_the_truth(explicit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "EXPLICIT_UP_TO", explicit)
    lengths = [12, 3, 9]
    low = [t.detach().bfloat16().requires_grad_() for t in qkv(24, 4, 2)]
    wide = [t.detach().double().requires_grad_() for t in low]
    found, expected = packed(low, lengths), by_loops(*wide, lengths, 0.6)
    assert found.dtype is torch.bfloat16
    ours = torch.autograd.grad(found.float().square().sum(), low)
    theirs = torch.autograd.grad(expected.square().sum(), wide)
    for a, b in zip([found, *ours], [expected, *theirs], strict=True):
        assert (a.double() - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("new", [1, 3])
def test_cached_attention_is_the_tail_of_the_whole(heads: tuple[int, int], new: int) -> None:
    """Streams of different age over one cache; places behind a stream's own position hold rubbish."""
    ages = [7, 4]
    keys, values = (torch.full((2, heads[1], 9, D), 1e4, dtype=torch.float64) for _ in range(2))
    queries, expected = [], []
    for i, age in enumerate(ages):
        q, k, v = (t.detach() for t in qkv(age, *heads))
        keys[i, :, :age], values[i, :, :age] = k.transpose(0, 1), v.transpose(0, 1)
        queries.append(q[-new:])
        expected.append(by_loops(q, k, v, [age], 0.6)[-new:])
    positions = torch.stack([torch.arange(age - new, age) for age in ages])
    found = cached_attention(torch.stack(queries), keys, values, positions, 0.6)
    torch.testing.assert_close(found, torch.stack(expected))
