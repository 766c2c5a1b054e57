"""Everything that training runs, on a GPU that is not there: fake tensors on one refuse to meet any on the CPU.

Where PyTorch is built without CUDA its fake tensors cannot even be sliced, so another accelerator stands in for it: what
is proved, that no tensor is left behind on the CPU, is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import build_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from twofold.adapter.attach import attach, merge
from twofold.adapter.config import LoraConfig
from twofold.base.batch import PackedBatch
from twofold.base.blocks import Decoder, describe
from twofold.functional import attention
from twofold.functional.attention import buckets, cached_attention, packed_attention
from twofold.functional.loss import head_loss, logits_loss
from twofold.functional.norm import rms_norm, rms_norm_backward
from twofold.functional.rope import rope
from twofold.functional.swiglu import swiglu, swiglu_backward
from twofold.layers.embedding import LoraEmbedding
from twofold.layers.linear import LoraLinear, project
from twofold.lowrank.factors import LowRank, merged_weight
from twofold.lowrank.linear import Projection, _cast, drop, group_backward, group_forward, group_product
from twofold.training.block import hidden_states

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
GPU = torch.device("cuda:0" if torch.backends.cuda.is_built() else "lazy:0")


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=GPU)


def on_gpu(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is not None
        assert tensor.device == GPU


def test_the_fake_gpu_refuses_tensors_of_the_cpu() -> None:
    """Or none of these tests could fail."""
    with pytest.raises(RuntimeError, match="device"):
        gpu(3) + torch.ones(3)


def decoder_on_gpu(dtype: torch.dtype, family: str = "llama", **settings: Any) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(GPU):
            model: nn.Module = build_model(family)
    finally:
        torch.set_default_dtype(before)
    attach(model, LoraConfig(r=4, **settings))
    return model


def a_batch(*lengths: int) -> PackedBatch:
    rows = sum(lengths)
    return PackedBatch(ids(rows), ids(rows), lengths, ids(5), ids(5))


@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_group_forward_and_backward(dtype: torch.dtype, dropout: float) -> None:
    x = gpu(9, 8, dtype=dtype)
    update = LowRank(gpu(2, 8), gpu(6, 2), 2.0)
    group = [
        Projection(gpu(6, 8, dtype=dtype), gpu(6, dtype=dtype), update),
        Projection(gpu(4, 8, dtype=dtype), None, None),
    ]
    inside, kept = _cast(group, dtype), drop(x, dropout)
    outputs, h = group_forward(x, kept, inside)
    dx, dA, dBs = group_backward(outputs, x, kept, h, inside, input_gradient=True)
    on_gpu(*outputs, h, dx, dA, dBs[0])
    assert dx is not None
    assert dx.dtype is dtype
    on_gpu(*group_product(x[None], group, dropout))
    on_gpu(update.delta(), merged_weight(gpu(6, 8, dtype=dtype), [update.delta()]))


@DTYPES
def test_norm_rotation_gate_and_losses(dtype: torch.dtype) -> None:
    x, weight = gpu(9, 8, dtype=dtype), gpu(8, dtype=dtype)
    on_gpu(rms_norm(x, weight, 1e-5), rms_norm_backward(x, x, weight, gpu(9, 1)))
    on_gpu(swiglu(x, x), *swiglu_backward(x, x, x))
    on_gpu(rope(gpu(9, 2, 4, dtype=dtype), gpu(9, 2, dtype=dtype), gpu(9, 2, dtype=dtype)))
    on_gpu(
        *head_loss(x.requires_grad_(), gpu(20, 8, dtype=dtype), ids(9)), *logits_loss(gpu(9, 20, dtype=dtype), ids(9))
    )


@DTYPES
@pytest.mark.parametrize("explicit", [0, 512], ids=["fused", "explicit"])
def test_attention(dtype: torch.dtype, explicit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "EXPLICIT_UP_TO", explicit)
    lengths = (5, 3, 1)
    q, k = gpu(9, 4, 8, dtype=dtype), gpu(9, 2, 8, dtype=dtype)
    for bucket in (packed := buckets(lengths, GPU)):
        on_gpu(bucket.gather, bucket.places, bucket.tokens, bucket.mask)
    on_gpu(packed_attention(q, k, k, packed, 0.3))
    cache = gpu(3, 2, 12, 8, dtype=dtype)
    for new in (1, 3):
        on_gpu(cached_attention(gpu(3, new, 4, 8, dtype=dtype), cache, cache, ids(3, new), 0.3))


@DTYPES
def test_adapted_layers(dtype: torch.dtype) -> None:
    model = decoder_on_gpu(
        dtype, "qwen2", target_modules=("q_proj", "embed_tokens"), bias="all", lora_dropout=0.5
    ).train()
    layers = [m for m in model.modules() if isinstance(m, LoraLinear | LoraEmbedding)]
    assert {type(m) for m in layers} == {LoraLinear, LoraEmbedding}
    for layer in layers:
        on_gpu(*layer.shares.parameters(), layer.delta())
        on_gpu(layer(ids(2, 3)) if isinstance(layer, LoraEmbedding) else layer(gpu(2, 3, 32, dtype=dtype)))
    linear = next(m for m in layers if isinstance(m, LoraLinear))
    on_gpu(*project(gpu(2, 3, 32, dtype=dtype), linear, nn.Linear(32, 4, device=GPU, dtype=dtype)))
    merge(model)
    on_gpu(*(layer.merged for layer in layers))
    on_gpu(linear(gpu(2, 3, 32, dtype=dtype)))


@DTYPES
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_described_model_from_tokens_to_loss(dtype: torch.dtype, family: str) -> None:
    model = decoder_on_gpu(dtype, family).train()
    decoder, batch = describe(model), a_batch(6, 2, 5)
    assert isinstance(decoder, Decoder)
    hidden = hidden_states(decoder, batch)
    on_gpu(hidden)
    head: Any = decoder.head
    on_gpu(*head_loss(hidden[batch.predicting], head.weight, batch.labels))


@DTYPES
def test_the_models_own_forward(dtype: torch.dtype) -> None:
    model = decoder_on_gpu(dtype, "gpt2", init_lora_weights="gaussian", bias="all")
    on_gpu(*(p for p in model.parameters() if p.requires_grad))
    on_gpu(model(input_ids=ids(2, 5)).logits)


def test_a_batch_moves_whole_and_unpacks_where_it_lies() -> None:
    cpu = PackedBatch(
        *(torch.empty(9, dtype=torch.int64) for _ in range(2)), (5, 4), *(torch.empty(3).long() for _ in range(2))
    )
    moved = cpu.to(GPU)
    on_gpu(moved.token_ids, moved.positions, moved.predicting, moved.labels)
