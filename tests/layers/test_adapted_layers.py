"""One adapted layer at a time: its forward, delta and merge against the formula, for each kind of base module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import build_model
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from twofold.errors import ConfigError
from twofold.layers.embedding import EmbeddingShare, LoraEmbedding
from twofold.layers.linear import LinearShare, LoraConv1D, LoraLinear, dropout_of, project
from twofold.layers.protocol import Share, checked_name
from twofold.layers.saved import BiasShare, CopyShare, TrainedBias, TrainedCopy

IN, OUT = 6, 5


def linear_base(kind: str) -> nn.Module:
    base = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=kind == "bias")
    if isinstance(base, Conv1D):
        nn.init.normal_(base.bias)
    return base.double().requires_grad_(False)


def share(r: int, *, scale: float = 0.5, weight: float = 1.0, dropout: float = 0.0, bias: bool = False) -> LinearShare:
    change = torch.randn(OUT, dtype=torch.float64) if bias else None
    factors = torch.randn(r, IN, dtype=torch.float64), torch.randn(OUT, r, dtype=torch.float64)
    made = LinearShare(factors, scale, dropout, change)
    made.weight_when_active = weight
    return made


def formula(base: nn.Module, x: Tensor, shares: list[LinearShare]) -> Tensor:
    y = base(x)
    for s in shares:
        y = y + s.weight_when_active * s.scale * (x @ s.A.T) @ s.B.T
        if s.bias_change is not None:
            y = y + s.weight_when_active * s.bias_change
    return y


@pytest.mark.parametrize("kind", ["plain", "bias", "conv1d"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_forward_is_the_formula_and_merging_keeps_it(kind: str, count: int) -> None:
    base = linear_base(kind)
    layer = LoraLinear.from_base(base)
    assert type(layer) is (LoraConv1D if kind == "conv1d" else LoraLinear)
    shares = [share(i + 1, weight=0.5 - i, bias=kind != "plain") for i in range(count)]
    for i, s in enumerate(shares):
        layer.add(f"a{i}", s)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x), formula(base, x, shares)
    torch.testing.assert_close(found, expected)
    inputs = [x, *(p for s in shares for p in s.parameters())]
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(layer.delta(), sum(s.weight_when_active * s.scale * s.B @ s.A for s in shares))
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer(x), found)


def test_a_share_is_silent_until_it_is_active_and_while_the_layer_is_disabled() -> None:
    base = linear_base("bias")
    layer = LoraLinear.from_base(base)
    layer.add("a", share(2, weight=0.0))
    x = torch.randn(3, IN, dtype=torch.float64)
    assert torch.equal(layer(x), base(x))
    assert not layer.delta().any()
    layer.add("b", share(2))
    assert not torch.equal(layer(x), base(x))
    layer.adapters.enabled = False
    assert torch.equal(layer(x), base(x))
    with pytest.raises(ConfigError, match="'a' is attached already"):
        layer.add("a", share(2))


def test_dropout_falls_on_the_way_into_a_only_and_only_in_training() -> None:
    base = linear_base("plain")
    layer = LoraLinear.from_base(base).train()
    layer.add("a", s := share(2, dropout=0.5))
    x = torch.ones(4000, IN, dtype=torch.float64)
    outputs = layer(x)
    torch.testing.assert_close(outputs.mean(0), formula(base, x[:1], [s])[0], rtol=0.1, atol=0.2)
    assert float(outputs.std(0).min()) > 0.01
    with torch.no_grad():
        s.B.zero_()
    assert torch.equal(layer(x), base(x))
    assert dropout_of([layer]) == 0.5
    assert dropout_of([layer.eval()]) == 0.0


@pytest.mark.parametrize("fused", [False, True])
def test_adapters_of_different_dropout_do_not_train_together(fused: bool) -> None:
    """On one layer, or on two that read the same input in one pass."""
    layers = [LoraLinear.from_base(linear_base("plain")).train() for _ in range(1 + fused)]
    for i, s in enumerate([share(2, dropout=0.5), share(3, dropout=0.1)]):
        layers[i % len(layers)].add(f"a{i}", s)
    x = torch.randn(4, IN, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"lora_dropout 0\.1 and 0\.5"):
        project(x, *layers)
    layers[-1].shares["a1"].weight_when_active = 0.0
    project(x, *layers)
    layers[-1].shares["a1"].weight_when_active = 1.0
    for layer, y in zip(layers, project(x, *(layer.eval() for layer in layers)), strict=True):
        torch.testing.assert_close(y, formula(layer.base, x, list(layer.shares.values())))


def test_fused_layers_give_what_each_gives_alone() -> None:
    bare = nn.Linear(IN, 3).double().requires_grad_(False)
    adapted, biased = LoraLinear.from_base(linear_base("bias")), LoraLinear.from_base(linear_base("bias"))
    adapted.add("a", share(2))
    biased.add("a", share(3, bias=True))
    x = torch.randn(2, 4, IN, dtype=torch.float64)
    for fused, module in zip(project(x, bare, adapted, biased), (bare, adapted, biased), strict=True):
        torch.testing.assert_close(fused, module(x))


def test_an_adapted_layer_shows_weight_and_bias_of_its_base() -> None:
    base = linear_base("bias")
    layer = LoraLinear.from_base(base)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert LoraLinear.from_base(nn.Linear(2, 2).train()).training
    assert not LoraLinear.from_base(nn.Linear(2, 2).eval()).training


# ---------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_embedding_forward_is_the_formula_and_merging_keeps_it(kind: str) -> None:
    plain = nn.Embedding(9, 4)
    base = plain if kind == "plain" else Gemma3TextScaledWordEmbedding(9, 4, padding_idx=0, embed_scale=3.0)
    base = base.double().requires_grad_(False)
    layer = LoraEmbedding.from_base(base)
    for i in range(2):
        s = EmbeddingShare((torch.randn(2, 9).double(), torch.randn(4, 2).double()), 0.5)
        s.weight_when_active = 1.0 - 3 * i
        layer.add(f"a{i}", s)
    table = base.weight + sum(
        s.weight_when_active * s.scale * (s.B @ s.A).T
        for s in layer.shares.values()  # type: ignore[operator, union-attr]
    )
    ids = torch.tensor([[1, 8, 3], [3, 3, 5]])
    expected = F.embedding(ids, table) * (1.0 if kind == "plain" else 3.0)
    found = layer(ids)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.delta(), table - base.weight)
    inputs = list(layer.shares.parameters())
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    layer.merge()
    torch.testing.assert_close(layer(ids), expected)
    layer.adapters.enabled = False
    assert torch.equal(layer(ids), base(ids))


# ---------------------------------------------------------------------------------------- whole modules, biases


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_trained_copy_is_float32_or_wider_and_never_the_base(dtype: torch.dtype) -> None:
    base = nn.LayerNorm(4).to(dtype).requires_grad_(False)
    layer = TrainedCopy.from_base(base)
    copy = CopyShare(base)
    layer.add("a", copy)
    assert {p.dtype for p in copy.parameters()} == {torch.promote_types(dtype, torch.float32)}
    assert all(p.requires_grad for p in copy.parameters())
    x = torch.randn(3, 4).to(dtype)
    assert torch.equal(layer(x), base(x))
    copy.weight_when_active = 1.0
    with torch.no_grad():
        copy.module.weight.mul_(2)
    torch.testing.assert_close(layer(x), base(x) * 2)
    assert layer(x).dtype is dtype
    assert bool((base.weight == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_copy_of_a_whole_attention_is_called_as_the_model_calls_it(dtype: torch.dtype) -> None:
    """By keywords, with tuples in and out; its products are float32's, rounded once to the base's type."""
    base = build_model("llama").model.layers[0].self_attn.to(dtype).requires_grad_(False)
    layer, held = TrainedCopy.from_base(base), CopyShare(base)
    layer.add("a", held)
    held.weight_when_active = 1.0
    x, turn = torch.randn(2, 5, 32).to(dtype), torch.randn(2, 5, 8).to(dtype)
    y, _ = layer(hidden_states=x, position_embeddings=(turn, turn), attention_mask=None)
    expected, _ = base.float()(
        hidden_states=x.float(), position_embeddings=(turn.float(), turn.float()), attention_mask=None
    )
    assert torch.equal(y, expected.to(dtype))


def test_a_trained_bias_shifts_the_output_by_its_change() -> None:
    base = nn.LayerNorm(4).requires_grad_(False)
    layer = TrainedBias.from_base(base)
    shift = BiasShare(base.bias)
    layer.add("a", shift)
    x = torch.randn(3, 4)
    with torch.no_grad():
        shift.bias_change.copy_(torch.arange(4.0))
    assert torch.equal(layer(x), base(x))
    shift.weight_when_active = 2.0
    torch.testing.assert_close(layer(x), base(x) + 2 * torch.arange(4.0))
    assert torch.equal(shift.saved(base)["bias"], torch.arange(4.0))


def test_saved_tensors_come_back_through_load() -> None:
    base, table = linear_base("bias"), nn.Embedding(9, 4).double()
    pairs: list[tuple[nn.Module, Share, Share]] = [
        (base, share(2, bias=True), share(2, bias=True)),
        (table, *(EmbeddingShare((torch.randn(2, 9).double(), torch.randn(4, 2).double()), 1.0) for _ in range(2))),
        (base, CopyShare(base), CopyShare(linear_base("bias"))),
        (base, BiasShare(base.bias + 1), BiasShare(base.bias)),
    ]
    for module, held, other in pairs:
        saved = {k: v.clone() for k, v in held.saved(module).items()}
        other.load(module, saved)
        for key, tensor in other.saved(module).items():
            torch.testing.assert_close(tensor, saved[key])
            assert not tensor.requires_grad


@pytest.mark.parametrize("name", ["items", "_modules", "forward", "training", ".", "a/b"])
def test_words_of_the_container_cannot_name_adapters(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        checked_name(name)
