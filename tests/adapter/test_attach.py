"""Attach and detach on live models of every family: the base stays what it was, to the bit."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from families import FAMILIES, build_model, inputs, logits, randomise
from tiny_adapters import EMBEDDING, adapted, everything, learned
from torch import nn

from twofold.adapter.attach import (
    activate,
    active,
    adapter_layers,
    attach,
    attached,
    config_of,
    detach,
    disabled,
    merge,
    shares,
    unmerge,
)
from twofold.adapter.config import LoraConfig
from twofold.adapter.shapes import module_shapes
from twofold.errors import ConfigError, TargetError
from twofold.planning.parameters import plan_parameters


def hashes(model: nn.Module) -> dict[str, str]:
    """A digest of every base tensor, by its name in the bare model."""
    inner = {id(p) for _, layer in adapter_layers(model) for p in layer.shares.parameters()}
    return {
        name.replace(".base.", "."): hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if id(tensor) not in inner and not name.endswith(".merged")
    }


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


@pytest.mark.parametrize(
    ("family", "target", "saved"), [("gpt2", "c_attn", ("mlp",)), ("phi", "q_proj", ("mlp", "fc1"))]
)
def test_what_lies_inside_a_module_trained_whole_is_trained_and_counted_once(
    family: str, target: str, saved: tuple[str, ...]
) -> None:
    model = build_model(family)
    config = LoraConfig(r=2, target_modules=(target,), bias="all", modules_to_save=saved)
    planned = plan_parameters(config, module_shapes(model), 1).trainable
    assert attach(model, config, "b").trainable == planned
    attach(model, LoraConfig(r=2, target_modules=(target,)), "a")
    detach(model, "b")
    assert attached(model) == ["a"]


def test_inputs_of_other_shapes_than_batches_work() -> None:
    model = adapted("llama")
    row = inputs(model)["input_ids"][:1, :1]
    assert model(input_ids=row).logits.shape == (1, 1, 64)
