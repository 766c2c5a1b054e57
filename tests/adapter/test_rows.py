"""Mixed batches: every row as if it ran alone with its own adapters, and rows without one exactly as on the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build_model, inputs, logits, randomise
from torch import Tensor, nn

from twofold.adapter.attach import activate, active, attach, merge, unmerge
from twofold.adapter.config import LoraConfig
from twofold.adapter.rows import rows
from twofold.errors import ConfigError
from twofold.layers.embedding import EmbeddingShare, LoraEmbedding
from twofold.layers.linear import LinearShare, LoraLinear, project
from twofold.layers.protocol import AdapterLayer
from twofold.layers.rows import Rows
from twofold.layers.saved import BiasShare, CopyShare, TrainedBias, TrainedCopy
from twofold.lowrank.factors import LowRank
from twofold.lowrank.grouped import Spread, grouped_update, masked, masked_is_cheaper, segments

BATCH: list[Any] = ["a", None, "b", {"a": 0.5, "b": -2.0}, "b"]


def mixed_model(family: str) -> Any:
    model = build_model(family).requires_grad_(False)
    attach(model, LoraConfig(r=4, lora_alpha=8), "a")
    attach(model, LoraConfig(r=2, lora_alpha=6, use_rslora=True, bias="lora_only"), "b")
    randomise([(n, p) for n, p in model.named_parameters() if ".shares." in n], scale=0.1)
    activate(model, "a")
    return model


def row_inputs(model: Any) -> dict[str, Tensor]:
    """As many rows as the batch has, all different."""
    found = inputs(model)
    return {k: torch.cat([v, v.roll(1, 1), v.roll(2, 1)])[: len(BATCH)] for k, v in found.items()}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "opt"])
def test_every_row_is_as_if_alone_and_base_rows_are_the_bases(family: str) -> None:
    model = mixed_model(family)
    batch = row_inputs(model)
    activate(model, None)
    bare = model(**batch).logits
    activate(model, "a")
    with rows(model, BATCH):
        found = model(**batch).logits
    assert active(model) == {"a": 1.0}
    assert torch.equal(found[1], bare[1])
    for i, adapters in enumerate(BATCH):
        activate(model, adapters)
        alone = model(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0]
        torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-5)
        assert adapters is None or not torch.allclose(alone, bare[i], atol=1e-3)


@pytest.mark.parametrize("first", ["dora", "plain"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_rows_of_dora_and_of_a_bias_of_b_are_as_if_alone(family: str, first: str) -> None:
    """With DoRA among them each combination of adapters runs apart; without it all rows go through one product."""
    model = build_model(family).requires_grad_(False)
    attach(model, LoraConfig(r=4, use_dora=True), "dora")
    attach(model, LoraConfig(r=4, lora_alpha=8, lora_bias=True, bias="lora_only"), "biased")
    attach(model, LoraConfig(r=2), "plain")
    magnitudes = [p for n, p in model.named_parameters() if n.endswith(".magnitude")]
    lengths = [p.detach().clone() for p in magnitudes]
    randomise([(n, p) for n, p in model.named_parameters() if ".shares." in n], scale=0.1)
    with torch.no_grad():
        for parameter, length in zip(magnitudes, lengths, strict=True):
            parameter.add_(length)
    batch = row_inputs(model)
    chosen: list[Any] = [first, None, "biased", {"biased": 0.5, "plain": -2.0}, first]
    activate(model, None)
    bare = model(**batch).logits
    with rows(model, chosen):
        found = model(**batch).logits
    assert torch.equal(found[1], bare[1])
    for i, adapters in enumerate(chosen):
        activate(model, adapters)
        alone = model(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0]
        torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-5)
        assert adapters is None or not torch.allclose(alone, bare[i], atol=1e-3)
    with pytest.raises(ConfigError, match="'dora' is DoRA"), rows(model, [{"dora": 0.5}]):
        pass


def linear(base: nn.Module) -> tuple[AdapterLayer, Any]:
    def share(r: int) -> LinearShare:
        return LinearShare((torch.randn(r, 6).double(), torch.randn(5, r).double()), 0.5, 0.0, torch.randn(5).double())

    return LoraLinear.from_base(base), share


def test_whole_modules_biases_and_embeddings_are_told_apart_by_row_too() -> None:
    """Layer by layer, in float64, against the layer with one adapter active."""
    norm, table, plain = nn.LayerNorm(6).double(), nn.Embedding(9, 6).double(), nn.Linear(6, 5).double()
    layers: list[tuple[AdapterLayer, Any, Tensor]] = [
        (TrainedCopy.from_base(norm), lambda r: CopyShare(norm), torch.randn(4, 3, 6).double()),
        (TrainedBias.from_base(norm), lambda r: BiasShare(norm.bias), torch.randn(4, 3, 6).double()),
        (*linear(plain), torch.randn(4, 3, 6).double()),
        (*linear(plain), torch.randn(4, 6).double()),
        (
            LoraEmbedding.from_base(table),
            lambda r: EmbeddingShare((torch.randn(r, 9).double(), torch.randn(6, r).double()), 0.5),
            torch.randint(9, (4, 3)),
        ),
    ]
    for layer, make, x in layers:
        for i, name in enumerate("ab"):
            layer.add(name, make(i + 1))
        randomise(list(layer.shares.named_parameters()), scale=0.3)
        layer.adapters.rows = Rows(("b", "a", "gone"), torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1.0]]))
        found = layer(x)
        layer.adapters.rows = None
        for i, weights in enumerate([{"a": 1.0}, {}, {"b": 1.0}, {}]):
            layer.adapters.activate(weights)
            torch.testing.assert_close(found[i : i + 1], layer(x[i : i + 1]))
            assert not weights or not torch.allclose(found[i : i + 1], layer.base(x[i : i + 1]))


@pytest.mark.parametrize("way", [masked, segments, grouped_update])
def test_both_ways_are_the_sum_over_adapters(way: Any) -> None:
    """Unequal ranks and scales, several adapters on a row, weights of both signs; checked by the formula in float64."""
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    updates = [LowRank(torch.randn(r, 6).double(), torch.randn(5, r).double(), 0.3 * r - 1) for r in (1, 4, 2)]
    weights = torch.tensor([[1, 0, 0], [0, 0, 0], [0, -2, 0], [0.5, 1, 3], [0, 0, 1], [0, 0, 0], [1, 0, 0]]).double()
    expected = sum(weights[:, j, None] * (x @ u.delta().T) for j, u in enumerate(updates))
    found = way(x, updates, Spread.of(weights, x.device))
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("way", [masked, segments])
def test_an_adapter_that_overflows_spoils_no_other_row(way: Any) -> None:
    x = torch.full((2, 6), 1e30)
    updates = [
        LowRank(torch.full((2, 6), 1e30), torch.ones(5, 2), 1.0),
        LowRank(torch.ones(1, 6), torch.ones(5, 1), 1.0),
    ]
    found = way(x, updates, Spread.of(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), x.device))
    assert not torch.isfinite(found[0]).any()
    assert bool((found[1] == 0).all())


def test_few_rows_are_masked_and_long_prompts_of_many_adapters_are_cut() -> None:
    assert masked_is_cheaper(8, 1152, [16] * 8, [1] * 8)
    assert not masked_is_cheaper(8 * 512, 1152, [16] * 8, [512] * 8)
    assert masked_is_cheaper(512, 1152, [16], [512])


def test_what_cannot_be_told_by_rows_is_refused() -> None:
    model = mixed_model("llama")
    expected = logits(model)
    with pytest.raises(ConfigError, match=r"no adapter named 'c' \(attached are 'a', 'b'\)"), rows(model, ["a", "c"]):
        pass
    with pytest.raises(ConfigError, match="one adapter for each row"), rows(model, ["a"] * 3):
        logits(model)
    flat = mixed_model("opt")
    with pytest.raises(ConfigError, match="first dimension is not the batch"), rows(flat, BATCH):
        flat(**row_inputs(flat))  # OPT puts all tokens of a batch into one dimension
    attach(flat, LoraConfig(r=2, target_modules=("q_proj",)), "c")
    with rows(flat, ["c", None, None, "c", None]):
        assert flat(**row_inputs(flat)).logits.isfinite().all()  # whose rows none have an adapter there
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ConfigError, match="cannot be fused"), rows(model, ["a"]):
        project(torch.randn(1, 3, 32), layer)
    with pytest.raises(ConfigError, match="for inference"), rows(model.train(), ["a"]):
        pass
    model.eval()
    merge(model)
    with pytest.raises(ConfigError, match="merged"), rows(model, ["a"]):
        pass
    unmerge(model)
    assert torch.equal(logits(model), expected)


def test_two_whole_copies_of_a_module_do_not_fit_on_one_row_but_on_two() -> None:
    model = build_model("llama").requires_grad_(False)
    for name in "ab":
        attach(model, LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",)), name)
    randomise([(n, p) for n, p in model.named_parameters() if ".shares." in n])
    with pytest.raises(ConfigError, match="its own whole 'lm_head'"), rows(model, [{"a": 1.0, "b": 1.0}]):
        pass
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    with rows(model, ["a", "b"]):
        found = model(input_ids=ids).logits
    activate(model, "b")
    torch.testing.assert_close(found[1], model(input_ids=ids).logits[1], rtol=1e-4, atol=1e-5)


class Mixture(nn.Module):
    """Experts that are plain modules; every row goes to the first of them, but in an order that a router makes up."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.experts = nn.ModuleDict({"expert_0": nn.Linear(6, 6), "expert_1": nn.Linear(6, 6)})
        self.shared_experts = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(len(x)).flip(0)
        y: Tensor = self.up(x) + self.shared_experts(x)
        return y.index_add(0, order, self.experts["expert_0"](x[order]))


def test_rows_in_the_order_of_a_router_are_refused_and_adapters_outside_of_experts_served() -> None:
    model = Mixture().eval()
    x = torch.randn(3, 6)
    attach(model, LoraConfig(r=2), "all")
    attach(model, LoraConfig(r=2, target_modules=("up", "shared_experts")), "outside")
    randomise([(n, p) for n, p in model.named_parameters() if ".shares." in n], scale=0.3)
    with rows(model, ["outside", None, "outside"]):
        found = model(x)
    activate(model, "outside")
    torch.testing.assert_close(found[0], model(x)[0])
    activate(model, None)
    torch.testing.assert_close(found[1], model(x)[1])
    with pytest.raises(ConfigError, match="in the order of a router"), rows(model, ["all", None, "outside"]):
        model(x)
