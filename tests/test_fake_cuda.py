"""Everything that training runs, on a GPU that is not there: fake tensors on one refuse to meet any on the CPU.

Where PyTorch is built without CUDA its fake tensors cannot even be sliced, so another accelerator stands in for it: what
is proved, that no tensor is left behind on the CPU, is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import DESCRIBED, build_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from twofold.adapter.attach import attach, merge
from twofold.adapter.config import LoraConfig
from twofold.base.batch import Example, PackedBatch, pack
from twofold.base.blocks import Decoder, describe
from twofold.functional import attention
from twofold.functional.attention import Scoring, attention_backward, attention_forward, cached_attention
from twofold.functional.gated import ACTIVATIONS, gated, gated_backward
from twofold.functional.loss import head_loss, logits_loss
from twofold.functional.norm import Norm, reciprocal_rms, rms_norm, rms_norm_backward
from twofold.functional.rope import Angles, rotate
from twofold.functional.segments import AttentionPlan, Bucket, Heads, Segment, plan_attention
from twofold.layers.block import Rows, block_backward, block_forward
from twofold.layers.embedding import LoraEmbedding
from twofold.layers.linear import LoraLinear, project
from twofold.lowrank.factors import LowRank, merged_weight
from twofold.lowrank.linear import Group, Projection, drop, group_backward, group_forward, group_product
from twofold.training import block as training_block
from twofold.training.block import asked_states, plans_of
from twofold.training.layout import Layout, lay_out

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


def like_it(tensor: Tensor, device: torch.device = GPU) -> Tensor:
    """A fake of the same shape and type."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def faked(plan: AttentionPlan) -> AttentionPlan:
    """A plan as it looks on the GPU. Planning itself looks at numbers, which fakes have none of."""
    buckets = [
        Bucket(
            b.segments,
            like_it(b.queries),
            like_it(b.keys),
            b.prefix,
            tuple(replace(c, mask=like_it(c.mask)) for c in b.chunks),
        )
        for b in plan.buckets
    ]
    return AttentionPlan(plan.heads, tuple(buckets), like_it(plan.outputs), like_it(plan.own_keys), plan.spans)


def a_layout() -> Layout:
    """Of three examples, two of which begin alike; real, as planning needs it."""
    with unset_fake_temporarily():
        beginning = list(range(4, 14))
        examples = [Example([*beginning, *more], [i > 8 for i in range(10 + len(more))]) for more in ([20, 21], [22])]
        return lay_out(pack([*examples, Example([5, 6, 7], [False, True, True])]), share=True)


def plans(decoder: Decoder, layout: Layout, like: Tensor) -> list[AttentionPlan]:
    with unset_fake_temporarily():
        found = plans_of(decoder, layout, torch.empty(0, dtype=like.dtype))
    return [faked(p) for p in found]


@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_group_forward_and_backward(dtype: torch.dtype, dropout: float) -> None:
    x = gpu(9, 8, dtype=dtype)
    update = LowRank(gpu(2, 8).requires_grad_(), gpu(6, 2).requires_grad_(), 2.0)
    group = [
        Projection(gpu(6, 8, dtype=dtype), gpu(6, dtype=dtype), update),
        Projection(gpu(4, 8, dtype=dtype), None, None),
    ]
    for stretch in (None, gpu(6).requires_grad_()):
        group[0] = group[0]._replace(stretch=stretch)
        with torch.no_grad():
            inside, kept = Group.of(group, dtype, dropout), drop(x, dropout)
            outputs, h = group_forward(x, kept, inside)
            dx, found = group_backward(outputs, x, kept, h, inside, input_gradient=True)
            on_gpu(update.delta(), merged_weight(gpu(6, 8, dtype=dtype), [update.delta()]))
        assert [f.shape for f in found] == [(2, 8), (6, 2), *([] if stretch is None else [(6,)])]
        on_gpu(*outputs, h, dx, *found)
        assert dx is not None
        assert {dx.dtype, *(y.dtype for y in outputs)} == {dtype}
        on_gpu(*group_product(x[None], group, dropout))


@DTYPES
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_norm_rotation_gate_and_losses(dtype: torch.dtype, softcap: float | None) -> None:
    x = gpu(9, 8, dtype=dtype)
    for weight in (gpu(8, dtype=dtype), gpu(8)):
        norm = Norm(weight, 1e-5)
        on_gpu(rms_norm(x, norm), rms_norm_backward(x, x, reciprocal_rms(x, norm), norm))
    for f in ACTIVATIONS.values():
        on_gpu(gated(x, x, f), *gated_backward(x, x, x, f))
    for turned in (4, 2, 0):
        angles = Angles.of(gpu(9, turned, dtype=dtype), gpu(9, turned, dtype=dtype))
        on_gpu(rotate(gpu(9, 2, 4, dtype=dtype), angles), rotate(gpu(9, 2, 4, dtype=dtype), angles.back()))
    head = gpu(20, 8, dtype=dtype)
    on_gpu(*head_loss(x.requires_grad_(), head, ids(9), softcap), *logits_loss(gpu(9, 20, dtype=dtype), ids(9)))


@DTYPES
@pytest.mark.parametrize("keep", [0, 512], ids=["computed again", "kept"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention(dtype: torch.dtype, keep: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEEP_UP_TO", keep)
    with unset_fake_temporarily():
        segments = [Segment(0, 3), Segment(3, 4, 0, 3), Segment(7, 2), Segment(9, 20)]
        plan = plan_attention(segments, 30, Heads(4, 2), torch.empty(0, dtype=dtype), window=3)
    plan, scoring = faked(plan), Scoring(0.3, softcap)
    q, k = gpu(30, 4, 8, dtype=dtype), gpu(30, 2, 8, dtype=dtype)
    out, kept = attention_forward(q, k, k, plan, scoring)
    on_gpu(out, *(p for p in kept if p is not None), *attention_backward(out, q, k, k, kept, plan, scoring))
    cache = gpu(3, 2, 12, 8, dtype=dtype)
    for new in (1, 3):
        on_gpu(cached_attention(gpu(3, new, 4, 8, dtype=dtype), cache, cache, ids(3, new), scoring, 4))


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
def test_convolutions_attention_experts_and_tokens(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a list of tokens cannot be put on a device that is not there; a tensor of their shape stands for them."""
    monkeypatch.setattr(
        torch, "tensor", lambda found, device: torch.empty(len(found), dtype=torch.int64, device=device)
    )
    x = gpu(2, 4, 8, dtype=dtype)
    with torch.device(GPU):
        made: dict[str, nn.Module] = {
            "conv": nn.Conv1d(4, 4, 3, groups=2, padding=1, padding_mode="circular", dtype=dtype),
            "mha": nn.MultiheadAttention(8, 2, batch_first=True, dtype=dtype),
            "experts": Experts(dtype),
            "tokens": nn.Embedding(9, 8, dtype=dtype),
        }
    settings: dict[str, Any] = {"target_modules": ("conv", "mha"), "target_parameters": ("experts.weight",)}
    model = nn.ModuleDict(made)
    attach(model, LoraConfig(r=2, trainable_token_indices={"tokens": [3, 4]}, **settings))
    for merged in (False, True):
        if merged:
            merge(model)
        for name in made:
            given = ids(2, 3) if name == "tokens" else x
            out = model[name](given, given, given)[0] if name == "mha" else model[name](given)
            assert out.dtype is dtype
            on_gpu(out, *(p for p in model[name].parameters()))


class Experts(nn.Module):
    """Two stacked maps, multiplied by one after the other."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 8, 8, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.weight[0]), self.weight[1])


FAMILIES = pytest.mark.parametrize("family", DESCRIBED)


def described(family: str, dtype: torch.dtype, **settings: Any) -> Decoder:
    decoder = describe(decoder_on_gpu(dtype, family, **settings).train())
    assert isinstance(decoder, Decoder)
    return decoder


@DTYPES
@FAMILIES
def test_a_described_model_from_tokens_to_loss(
    dtype: torch.dtype, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, layout, cpu = described(family, dtype), a_layout(), torch.device("cpu")
    indices = ("token_ids", "positions", "asked", "predicting", "labels")
    layout_here = replace(layout, **{n: like_it(getattr(layout, n), cpu) for n in indices})
    monkeypatch.setattr(training_block, "plans_of", lambda d, _, like: plans(d, layout, like))
    hidden = asked_states(decoder, layout_here)
    on_gpu(hidden)
    assert hidden.dtype is dtype
    head: Any = decoder.head
    rows = hidden[like_it(layout.predicting)]
    on_gpu(*head_loss(rows, head.weight, like_it(layout.labels), decoder.logit_softcap), decoder.logits(rows))


@DTYPES
@FAMILIES
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_gradient_of_every_layer(dtype: torch.dtype, family: str, dropout: float) -> None:
    """The formulas alone: autograd's engine cannot run on a device that is not there."""
    decoder, layout = described(family, dtype, lora_dropout=dropout), a_layout()
    x = gpu(layout.rows, 32, dtype=dtype)
    angles = decoder.angles(x, ids(layout.rows))
    for block, plan in zip(decoder.blocks, plans(decoder, layout, x), strict=True):
        asked = None if block is not decoder.blocks[-1] else like_it(layout.asked)
        t, learned = decoder.tensors(block)
        rows = Rows(angles[block.turning], asked)
        with torch.no_grad():
            y, saved, kept = block_forward(
                x, t, rows, lambda q, k, v, plan=plan, t=t: attention_forward(q, k, v, plan, t.scoring)
            )
            dx, found = block_backward(torch.empty_like(y), t, rows, plan, saved, kept, input_gradient=True)
        on_gpu(y, dx, *found, *(s for s in saved if s is not None), *(p for p in kept if p is not None))
        assert dx is not None
        assert (y.dtype, dx.dtype, dx.shape) == (dtype, dtype, x.shape)
        assert [f.shape for f in found] == [p.shape for p in learned]


@DTYPES
@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_bias": True}, {"freeze_a": True}, {"init_lora_weights": "olora", "use_dora": True}],
    ids=" ".join,
)
def test_variants_on_both_paths(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    decoder = described("llama", dtype, **settings)
    for block in decoder.blocks:
        for modules in block.projections():
            for module in modules:
                assert isinstance(module, LoraLinear)
                on_gpu(
                    *(t for t in module.shares.state_dict().values()),
                    module(gpu(2, 3, module.matrix().shape[1], dtype=dtype)),
                )
                on_gpu(module.fold(), module.delta())
        tensors, learned = decoder.tensors(block)
        on_gpu(*(m.stretch for g in tensors.groups() for m in g.members if m.stretch is not None), *learned)


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
