"""Attach, activate, merge, detach on live models of every family: the base stays what it was, to the bit."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from families import FAMILIES, build_model, inputs, logits, randomise
from torch import Tensor, nn

from twofold.adapter.attach import (
    activate,
    active,
    adapter_layers,
    attach,
    attached,
    config_of,
    detach,
    disabled,
    is_merged,
    merge,
    shares,
    trainable_summary,
    unmerge,
)
from twofold.adapter.config import LoraConfig
from twofold.errors import ConfigError, TargetError
from twofold.layers.embedding import LoraEmbedding
from twofold.layers.linear import LoraLinear

EMBEDDING = {"gpt2": "wte", "bert": "word_embeddings", "bert-classifier": "word_embeddings"}


def hashes(model: nn.Module) -> dict[str, str]:
    """A digest of every base tensor, by its name in the bare model."""
    inner = {id(p) for _, layer in adapter_layers(model) for p in layer.shares.parameters()}
    return {
        name.replace(".base.", "."): hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if id(tensor) not in inner and not name.endswith(".merged")
    }


def deltas_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: layer.delta() for n, layer in adapter_layers(model) if isinstance(layer, LoraLinear | LoraEmbedding)}


def learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def adapted(family: str, config: LoraConfig | None = None, seed: int = 11) -> Any:
    model = build_model(family)
    attach(model, config or LoraConfig(r=4, lora_alpha=8))
    randomise(learned(model), seed=seed, scale=0.1)
    return model


def everything(family: str) -> LoraConfig:
    """Linear maps and embeddings, with all biases where there are any."""
    targets = rf".*(proj|query|key|value|dense|c_attn|c_fc|fc\d|\.q|\.k|\.v|\.o|wi|wo|{EMBEDDING.get(family, 'embed_tokens')})"
    pooler = r".*pooler.*" if family == "bert-classifier" else None
    return LoraConfig(r=4, target_modules=targets, exclude_modules=pooler, bias="all")


# ---------------------------------------------------------------------------------------- the base


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [True, "gaussian"])
@pytest.mark.parametrize("training", [False, True])
def test_at_step_0_the_adapted_model_equals_the_base_bit_for_bit(family: str, start: Any, training: bool) -> None:
    model = build_model(family).train(training).requires_grad_(False)  # torch picks attention kernels by it
    before = logits(model)
    attach(model, LoraConfig(init_lora_weights=start, lora_dropout=0.5))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_step_0_equals_the_base_with_learned_biases_and_embeddings(family: str, bias: Any) -> None:
    model = build_model(family)
    before = logits(model)
    attach(model, LoraConfig(**{**vars(everything(family)), "bias": bias}))
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_equals_the_base_bit_for_bit_with_adapted_embeddings(family: str) -> None:
    model = build_model(family).requires_grad_(False)
    before = logits(model)
    attach(model, LoraConfig(target_modules=(EMBEDDING.get(family, "embed_tokens"),)))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_equals_the_base_bit_for_bit_in_bfloat16(family: str) -> None:
    model = build_model(family).to(torch.bfloat16).requires_grad_(False)
    before = logits(model)
    attach(model, LoraConfig())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_never_written(family: str) -> None:
    """Attach, train, merge, unmerge, detach: every tensor keeps its bits, and the model its structure."""
    model = build_model(family)
    before, structure, outputs = hashes(model), repr(model), logits(model.requires_grad_(False))
    attach(model, everything(family))
    optimiser = torch.optim.SGD([p for _, p in learned(model)], lr=0.1)
    for _ in range(2):
        logits(model.train()).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert hashes(model) == before
    changed = logits(model.eval())
    assert not torch.allclose(changed, outputs)
    merge(model)
    assert hashes(model) == before
    unmerge(model)
    detach(model)
    assert hashes(model) == before
    assert repr(model) == structure
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_learns(family: str) -> None:
    model = adapted(family)
    logits(model).square().mean().backward()
    own = {id(p) for _, layer in adapter_layers(model) for p in layer.shares.parameters()}
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_gradient <= own
    assert {id(p) for p in model.parameters() if p.requires_grad} == own


# ---------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged_and_unmerging_restores_the_bits(family: str) -> None:
    model = adapted(family, everything(family))
    with disabled(model):
        bare = logits(model)
    before = logits(model)
    merge(model)
    assert is_merged(model)
    merged = logits(model)
    torch.testing.assert_close(merged, before, rtol=1e-5, atol=1e-5)
    with disabled(model):
        assert torch.equal(logits(model), bare)
    merge(model)
    assert torch.equal(logits(model), merged), "merging again changes nothing"
    unmerge(model)
    assert not is_merged(model)
    assert torch.equal(logits(model), before)


def test_a_merged_weight_is_the_base_plus_the_delta_rounded_once() -> None:
    model = adapted("llama").to(torch.bfloat16)
    merge(model)
    for _, layer in adapter_layers(model):
        assert isinstance(layer, LoraLinear)
        exact = layer.weight.double() + layer.delta().double()
        assert layer.merged is not None
        assert layer.merged.dtype is torch.bfloat16
        gap = (layer.merged.double() - exact).abs()
        assert bool((gap <= exact.abs() * 2**-8).all())


def test_what_is_merged_must_be_unmerged_before_choosing_others() -> None:
    model = adapted("llama")
    before = logits(model)
    merge(model)
    merged = logits(model)
    for change in (
        lambda: activate(model, None),
        lambda: activate(model, "default"),
        lambda: attach(model, LoraConfig(r=2), "other"),
    ):
        with pytest.raises(ConfigError, match="unmerge"):
            change()
    assert attached(model) == ["default"]
    assert torch.equal(logits(model), merged)
    unmerge(model)
    assert torch.equal(logits(model), before)


def test_detaching_one_of_two_merged_adapters_leaves_no_trace_of_it() -> None:
    model = adapted("llama")
    alone = logits(model)
    attach(model, LoraConfig(r=2), "second")
    randomise([(n, p) for n, p in learned(model) if ".second." in n], seed=5)
    activate(model, {"default": 1.0, "second": 1.0})
    merge(model)
    with pytest.raises(ConfigError, match="unmerge"):
        detach(model, "second")
    unmerge(model)
    detach(model, "second")
    assert torch.equal(logits(model), alone)


def test_all_adapters_can_be_detached_while_merged() -> None:
    model = build_model("llama").requires_grad_(False)
    bare = logits(model)
    attach(model, LoraConfig())
    randomise(learned(model))
    merge(model)
    detach(model)
    assert torch.equal(logits(model), bare)


def test_a_tied_head_keeps_its_weight_when_the_embedding_is_merged() -> None:
    model = build_model("llama-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    attach(model, LoraConfig(r=4, target_modules=("embed_tokens",)))
    randomise(learned(model))
    before = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---------------------------------------------------------------------------------------- several


@pytest.mark.parametrize("family", FAMILIES)
def test_several_active_adapters_add_up_by_their_weights(family: str) -> None:
    model = adapted(family, everything(family))
    second = LoraConfig(**{**vars(everything(family)), "r": 2, "use_rslora": True, "bias": "none"})
    attach(model, second, "b")
    randomise([(n, p) for n, p in learned(model) if ".b." in n], seed=23, scale=0.1)
    deltas: dict[str, dict[str, Tensor]] = {}
    for name in ("default", "b"):
        activate(model, name)
        deltas[name] = deltas_of(model)
    activate(model, weights := {"default": 0.3, "b": -1.5})
    assert active(model) == weights
    found = deltas_of(model)
    for name, delta in found.items():
        expected = sum(w * deltas[a][name] for a, w in weights.items())
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)
    together = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), together, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        ({"modules_to_save": ("lm_head",)}, {"target_modules": ("lm_head",)}, "'lm_head'"),
        ({}, {"modules_to_save": ("up_proj",), "target_modules": ("q_proj",)}, "'model.layers.0.mlp.up_proj'"),
        ({}, {"target_modules": ("o_proj",), "bias": "all"}, "'model.layers.0.self_attn.q_proj'"),
    ],
)
def test_adapters_that_change_a_module_in_different_ways_are_refused(first: Any, second: Any, clash: str) -> None:
    model = build_model("qwen2")
    attach(model, LoraConfig(**first))
    before, structure = logits(model), repr(model)
    with pytest.raises(ConfigError, match=f"another adapter changes .*{clash}"):
        attach(model, LoraConfig(**second), "b")
    assert repr(model) == structure
    assert torch.equal(logits(model), before)
    assert active(model) == {"default": 1.0}


def test_only_active_adapters_learn_and_count() -> None:
    model = adapted("llama")
    first = trainable_summary(model).trainable
    second = attach(model, LoraConfig(r=2, target_modules=("q_proj",)), "b")
    assert active(model) == {"b": 1.0}
    assert second.trainable < first
    assert {n.split(".shares.")[1].split(".")[0] for n, _ in learned(model)} == {"b"}
    activate(model, None)
    assert trainable_summary(model).trainable == 0
    activate(model, {"default": 1.0, "b": 0.5})
    assert trainable_summary(model).trainable == first + second.trainable


def test_disabled_runs_the_bare_base_and_comes_back_even_after_an_error() -> None:
    model = build_model("llama").requires_grad_(False)
    bare = logits(model)
    attach(model, LoraConfig())
    randomise(learned(model))
    changed = logits(model)

    def fail_inside() -> None:
        with disabled(model):
            assert torch.equal(logits(model), bare)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.equal(logits(model), changed)


def test_detaching_one_adapter_leaves_the_other_as_it_was() -> None:
    model = adapted("llama")
    alone = logits(model)
    attach(model, LoraConfig(r=2, target_modules=("q_proj", "lm_head")), "b")
    detach(model, "b")
    assert attached(model) == ["default"]
    assert not isinstance(model.lm_head, LoraLinear)
    activate(model, "default")
    assert torch.equal(logits(model), alone)


# ---------------------------------------------------------------------------------------- names, counts


@pytest.mark.parametrize("name", ["", "a.b", "a b", "../up", "-a", "shares/x", "keys", "training", "a:b", "ä"])
def test_names_that_files_or_requests_cannot_carry_are_refused(name: str) -> None:
    model = build_model("llama")
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        attach(model, LoraConfig(), name)
    assert attached(model) == []


@pytest.mark.parametrize("name", ["default", "my-adapter", "v2_final@3", "0", "lora_A", "base"])
def test_other_names_are_fine_and_make_no_difference(name: str) -> None:
    torch.manual_seed(1)
    model = build_model("llama")
    attach(model, LoraConfig(), name)
    for parameter in (p for _, p in learned(model)):
        parameter.data += 0.01
    torch.manual_seed(1)
    other = build_model("llama")
    attach(other, LoraConfig())
    for parameter in (p for _, p in learned(other)):
        parameter.data += 0.01
    assert torch.equal(logits(model), logits(other))


def test_a_name_is_taken_once_and_unknown_names_are_told_apart() -> None:
    model = adapted("llama")
    with pytest.raises(ConfigError, match="'default' is attached already"):
        attach(model, LoraConfig())
    for use in (lambda: activate(model, "defalt"), lambda: detach(model, "defalt"), lambda: config_of(model, "defalt")):
        with pytest.raises(ConfigError, match=r"no adapter named 'defalt'; did you mean 'default'\?"):
            use()
    assert active(model) == {"default": 1.0}


def test_a_refused_attach_leaves_the_model_untouched() -> None:
    model = build_model("llama")
    structure = repr(model)
    with pytest.raises(TargetError):
        attach(model, LoraConfig(target_modules=("q_proj", "nope")))
    assert repr(model) == structure
    assert all(p.requires_grad for p in model.parameters())


def test_the_summary_counts_every_parameter_once() -> None:
    model = build_model("llama-tied")
    base = sum(p.numel() for p in model.parameters())
    summary = attach(model, LoraConfig(r=4, target_modules=("q_proj", "embed_tokens")))
    expected = 2 * (4 * 32 + 32 * 4) + (4 * 64 + 32 * 4)
    assert (summary.trainable, summary.base, summary.modules) == (expected, base, 3)
    assert summary.fraction == expected / base
    assert str(summary).startswith(f"{expected:,} of {base:,} parameters train (")


def test_one_seed_gives_one_start_whatever_the_dtype_of_the_base() -> None:
    starts = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(4)
        model = build_model("llama").to(dtype)
        attach(model, LoraConfig())
        starts.append([p.detach() for _, p in learned(model)])
    assert all(torch.equal(a, b) and a.dtype is torch.float32 for a, b in zip(*starts, strict=True))


def test_adapted_layers_follow_the_model_into_training_mode() -> None:
    model = build_model("llama").train()
    attach(model, LoraConfig(lora_dropout=0.5))
    randomise(learned(model))
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


def test_saved_modules_run_the_active_copy_alone() -> None:
    model = build_model("llama").requires_grad_(False)
    bare = logits(model)
    attach(model, LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("norm", "lm_head")))
    assert torch.equal(logits(model), bare)
    assert sorted(n for n, s in shares(model, "default").items() if type(s).__name__ == "CopyShare") == [
        "lm_head",
        "model.norm",
    ]
    logits(model).square().mean().backward()
    assert all(p.grad is not None for n, p in learned(model) if "shares.default.module" in n)
    randomise(learned(model))
    assert not torch.allclose(logits(model), bare)
    activate(model, None)
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_which_biases_learn(bias: Any) -> None:
    model = build_model("phi")
    attach(model, LoraConfig(r=2, target_modules=("q_proj",), bias=bias))
    names = {n.split(".shares.")[0] for n, _ in learned(model) if "bias_change" in n}
    with_bias = {
        n.removesuffix(".bias").removesuffix(".base")
        for n, p in model.named_parameters()
        if n.endswith(".bias") and "shares" not in n
    }
    adapted_ones = {n for n in with_bias if n.endswith("q_proj")}
    assert names == {"none": set(), "lora_only": adapted_ones, "all": with_bias}[bias]


def test_inputs_of_other_shapes_than_batches_work() -> None:
    model = adapted("llama")
    row = inputs(model)["input_ids"][:1, :1]
    assert model(input_ids=row).logits.shape == (1, 1, 64)
