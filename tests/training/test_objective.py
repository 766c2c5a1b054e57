"""The summed loss of a packed batch: fast path, plain path and a masked cross-entropy written out by hand agree."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import CAUSAL, DESCRIBED, build_model, randomise
from losses import adapted, by_hand, learned, some_examples
from torch import Tensor, nn

from twofold.adapter.attach import adapter_layers, attach
from twofold.adapter.config import LoraConfig
from twofold.base.batch import Example, PackedBatch, pack
from twofold.base.blocks import Decoder, NotDescribed, describe
from twofold.functional import attention, segments
from twofold.training.objective import (
    FastObjective,
    PlainObjective,
    evaluate_loss,
    objective_for,
    plain_objective,
)

LENGTHS = (9, 4, 12, 2, 12, 7)


def alike_examples() -> list[Example]:
    """Some that begin alike, one that is nothing but that beginning, some that do not; the beginning is supervised in part."""
    beginning = some_examples(11, seed=8)[0]
    continued = [
        Example(beginning.token_ids + e.token_ids, beginning.supervised + e.supervised) for e in some_examples(9, 4, 13)
    ]
    return [*some_examples(12, 2), *continued, beginning, *some_examples(7, seed=6)]


def attend_by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make attention keep its probabilities, compute them again, or go through the queries in several chunks."""
    if way != "kept":
        monkeypatch.setattr(attention, "KEEP_UP_TO", 0)
    if way == "in chunks":
        monkeypatch.setattr(segments, "CHUNK_SCORES", 1)
        monkeypatch.setattr(segments, "CHUNK_MULTIPLE", 4)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = learned(model)
    found = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative distance of a gradient."""
    assert set(found) == set(expected)
    return max(float((found[n].float() - g.float()).norm() / g.float().norm()) for n, g in expected.items())


def plain(model: Any, pad_id: int = 0, *, recompute: bool = False) -> PlainObjective:
    return plain_objective(model, pad_id, NotDescribed("asked for"), recompute=recompute)


def fast(model: Any, *, recompute: bool = False) -> FastObjective:
    described = describe(model)
    assert isinstance(described, Decoder)
    return FastObjective(described, recompute)


# ---------------------------------------------------------------------------------------- right at all


@pytest.mark.parametrize("family", CAUSAL)
def test_the_loss_is_the_masked_cross_entropy_over_all_logits(family: str) -> None:
    model, examples = adapted(family), some_examples(*LENGTHS)
    expected, hits = by_hand(model, examples)
    for objective in (plain(model), objective_for(model, 0, recompute=False)):
        found = objective(pack(examples))
        torch.testing.assert_close(found.loss_sum.double(), expected.double(), rtol=1e-5, atol=1e-5)
        assert int(found.correct) == hits


@pytest.mark.parametrize("family", CAUSAL)
def test_the_gradients_are_those_of_the_masked_cross_entropy(family: str) -> None:
    model, examples = adapted(family), some_examples(*LENGTHS)
    expected = gradients(model, by_hand(model, examples)[0])
    assert distance(gradients(model, plain(model)(pack(examples)).loss_sum), expected) < 2e-5


def test_the_softcapped_logits_of_gemma2_are_what_is_learned_from() -> None:
    """With the cap at 2 no token can be much likelier than another, so a loss over bare logits would be far off."""
    model = adapted("gemma2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        examples = some_examples(8, 8)
        logits = model(input_ids=torch.tensor([e.token_ids for e in examples])).logits
        assert float(logits.abs().max()) <= 2.0
        bounded = plain(model)(pack(examples)).loss_sum
        torch.testing.assert_close(bounded, by_hand(model, examples)[0].float(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------- fast = plain


@pytest.mark.parametrize("family", DESCRIBED)
@pytest.mark.parametrize("way", ["kept", "computed again", "in chunks"])
@pytest.mark.parametrize("target", ["all-linear", "attention", "mlp"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
def test_fast_and_plain_paths_agree(
    family: str, way: str, target: str, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend_by(way, monkeypatch)
    model, batch = adapted(family, target=target), pack(alike_examples())
    quick, slow = replace(fast(model), share_prefixes=share)(batch), plain(model)(batch)
    torch.testing.assert_close(quick.loss_sum, slow.loss_sum, rtol=1e-5, atol=0)
    assert quick.correct == slow.correct
    assert distance(gradients(model, quick.loss_sum), gradients(model, slow.loss_sum)) < 1e-5


@pytest.mark.parametrize("family", DESCRIBED)
def test_bfloat16_paths_are_equally_near_the_truth(family: str) -> None:
    """Both paths round at other places; neither may be further from float32 than bfloat16's 8 bits explain."""
    model, batch = adapted(family), pack(some_examples(*LENGTHS))
    truth = plain(model)(batch).loss_sum
    expected = gradients(model, truth)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))
    for objective in (fast(model), plain(model)):
        loss = objective(batch).loss_sum
        assert loss.dtype is torch.float32
        torch.testing.assert_close(loss, truth, rtol=0.01, atol=0)
        assert distance(gradients(model, loss), expected) < 0.1
    off = {type(o): distance(gradients(model, o(batch).loss_sum), expected) for o in (fast(model), plain(model))}
    assert off[FastObjective] < 2 * off[PlainObjective], off


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recomputing_gives_the_same_bits(family: str) -> None:
    model, batch = adapted(family, dropout=0.3).train(), pack(some_examples(*LENGTHS))

    def run(*, recompute: bool) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(1)
        loss = fast(model, recompute=recompute)(batch).loss_sum
        return loss, gradients(model, loss)

    (kept, first), (again, second) = run(recompute=False), run(recompute=True)
    assert torch.equal(kept, again)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "llama"])
def test_the_plain_path_recomputes_to_the_same_gradients(family: str) -> None:
    model, batch = adapted(family).train(), pack(some_examples(*LENGTHS))
    expected = gradients(model, plain(model)(batch).loss_sum)
    runs: list[str] = []
    for name, layer in adapter_layers(model):
        layer.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # transformers' word for what it will take away
        objective = plain(model, recompute=True)
    assert distance(gradients(model, objective(batch).loss_sum), expected) < 1e-5
    assert len(runs) == 2 * len(set(runs)) > 0, "each layer runs again in the backward"


def test_dropout_is_live_in_training_and_off_in_evaluation() -> None:
    model, batch = adapted("llama", dropout=0.5), pack(some_examples(*LENGTHS))
    objective = fast(model)
    assert torch.equal(objective(batch).loss_sum, objective(batch).loss_sum)
    model.train()
    assert not torch.equal(objective(batch).loss_sum, objective(batch).loss_sum)


# ---------------------------------------------------------------------------------------- frozen lower layers


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
def test_remembered_lower_layers_give_the_same_loss_and_gradients(share: bool) -> None:
    model = build_model("llama")
    attach(model, LoraConfig(r=4, layers_to_transform=(1,)))
    randomise(list(learned(model).items()), scale=0.1)
    batch = pack(alike_examples())
    expected = fast(model)(batch)
    objective = objective_for(model, 0, recompute=False, share_prefixes=share, cache_frozen=True)
    assert isinstance(objective, FastObjective)
    assert objective.trunk is not None
    assert objective.trunk.depth == 1
    for _ in range(2):
        found = objective(batch)
        torch.testing.assert_close(found.loss_sum, expected.loss_sum, rtol=1e-5, atol=0)
        assert distance(gradients(model, found.loss_sum), gradients(model, fast(model)(batch).loss_sum)) < 1e-5
    with torch.no_grad():  # what is remembered is not computed again
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    assert torch.equal(objective(batch).loss_sum, found.loss_sum)


@pytest.mark.parametrize(
    "lowest",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["lm_head"], "trainable_token_indices": [11, 15, 58]},
    ],
    ids=["first layer", "adapted embedding", "whole embedding", "single tokens"],
)
def test_nothing_is_remembered_where_the_embedding_or_the_first_layer_learns(lowest: dict[str, Any]) -> None:
    model, batch = build_model("llama"), pack(alike_examples())
    attach(model, LoraConfig(r=2, **lowest))
    randomise(list(learned(model).items()), scale=0.1)
    objective = objective_for(model, 0, recompute=False, cache_frozen=True)
    assert "cache_frozen has nothing to keep" in objective.path
    expected = gradients(model, plain(model)(batch).loss_sum)
    assert distance(gradients(model, objective(batch).loss_sum), expected) < 1e-5


# ---------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("family", CAUSAL)
def test_a_packed_batch_gives_the_loss_of_its_examples_one_by_one(family: str) -> None:
    model, examples = adapted(family), some_examples(*LENGTHS)
    objective = objective_for(model, 0, recompute=False)
    alone = sum(objective(pack([e])).loss_sum for e in examples)
    torch.testing.assert_close(objective(pack(examples)).loss_sum, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_accumulation_weighted_by_supervised_tokens_equals_one_big_batch(family: str) -> None:
    model, examples = adapted(family), some_examples(*LENGTHS)
    objective = objective_for(model, 0, recompute=False)

    def mean(batches: list[PackedBatch]) -> Tensor:
        supervised = sum(b.supervised_tokens for b in batches)
        return sum((objective(b).loss_sum / supervised for b in batches), torch.zeros(()))

    whole, split = mean([pack(examples)]), mean([pack(examples[:1]), pack(examples[1:3]), pack(examples[3:])])
    torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-6)
    assert distance(gradients(model, split), gradients(model, whole)) < 2e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_pad_token_never_counts_even_where_it_is_the_end_token(family: str) -> None:
    """Examples that end in token 2, padded with token 2: the end stays learned, the padding does not."""
    model = adapted(family)
    examples = [Example([*e.token_ids, 2], [*e.supervised, True]) for e in some_examples(3, 9)]
    batch = pack(examples)
    assert int((batch.labels == 2).sum()) == 2
    torch.testing.assert_close(
        plain(model, 2)(batch).loss_sum.double(), by_hand(model, examples)[0], rtol=1e-5, atol=1e-5
    )


def test_the_first_token_is_never_a_label() -> None:
    batch = pack([Example([5, 6], [True, True]), Example([7, 8, 9], [True, False, True])])
    assert batch.labels.tolist() == [6, 9]
    assert batch.predicting.tolist() == [0, 3]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2]
    assert batch.lengths == (2, 3)


def test_evaluation_weighs_by_tokens() -> None:
    model, examples = adapted("llama"), some_examples(*LENGTHS)
    expected, hits = by_hand(model, examples)
    count = sum(e.supervised_tokens for e in examples)
    objective = objective_for(model, 0, recompute=False)
    found = evaluate_loss(objective, [pack(examples[:1]), pack(examples[1:])])
    assert found.loss == pytest.approx(expected.item() / count, rel=1e-5)
    assert (found.token_accuracy, found.tokens) == (hits / count, count)


# ---------------------------------------------------------------------------------------- whatever learns


@pytest.mark.parametrize("saved", ["norm", "lm_head", "down_proj", "self_attn", "mlp"])
def test_whole_trained_modules_are_learned_from_on_whatever_path(saved: str) -> None:
    model, examples = build_model("llama"), some_examples(*LENGTHS)
    attach(model, LoraConfig(r=2, target_modules=("q_proj", "up_proj"), modules_to_save=(saved,)))
    randomise(list(learned(model).items()), scale=0.1)
    loss = objective_for(model, 0, recompute=False)(pack(examples)).loss_sum
    expected = by_hand(model, examples)[0]
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    assert distance(gradients(model, loss), gradients(model, expected)) < 2e-5


@pytest.mark.parametrize("target", [("lm_head", "q_proj"), ("embed_tokens", "v_proj"), ("embed_tokens", "lm_head")])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_an_adapted_head_or_embedding_is_learned_from(family: str, target: tuple[str, ...]) -> None:
    model, examples = build_model(family), some_examples(*LENGTHS)
    attach(model, LoraConfig(r=2, target_modules=target))
    randomise(list(learned(model).items()), scale=0.1)
    loss = objective_for(model, 0, recompute=False)(pack(examples)).loss_sum
    expected = by_hand(model, examples)[0]
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    assert distance(gradients(model, loss), gradients(model, expected)) < 2e-5


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_learned_biases_take_part_on_the_fast_path(bias: Any) -> None:
    model, examples = build_model("qwen2"), some_examples(*LENGTHS)
    attach(model, LoraConfig(r=2, bias=bias))
    randomise(list(learned(model).items()), scale=0.1)
    loss = objective_for(model, 0, recompute=False)(pack(examples)).loss_sum
    expected = by_hand(model, examples)[0]
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    found, right = gradients(model, loss), gradients(model, expected)
    largest = max(float(g.norm()) for g in right.values())
    assert any("bias_change" in n for n in right)
    for name, gradient in right.items():
        assert (found[name] - gradient).norm() < 2e-5 * gradient.norm() + 1e-6 * largest, name
