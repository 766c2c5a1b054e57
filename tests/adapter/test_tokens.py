"""New tokens: only their rows are trained and saved, tied heads follow, and PEFT reads and writes the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build_model, logits, randomise
from safetensors.torch import load_file
from tiny_adapters import learned
from torch import Tensor, nn

from twofold.adapter.attach import (
    activate,
    attach,
    detach,
    disabled,
    folding,
    merge,
    shares,
    trainable_summary,
    unmerge,
)
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, save_adapter
from twofold.adapter.shapes import module_shapes
from twofold.base.blocks import Decoder, describe
from twofold.errors import AdapterFileError, TargetError
from twofold.layers.tokens import ROWS, TrainedTokens
from twofold.merging.checkpoint import merged_state
from twofold.planning.parameters import plan_parameters

NEW = [64, 67, 5]
FAMILIES = pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "gpt2", "t5", "bert"])


def resized(family: str, seed: int = 7) -> Any:
    """With eight new tokens, random by `seed`."""
    model = build_model(family)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model.resize_token_embeddings(72, mean_resizing=False)
    if family == "bert":
        model.cls.predictions.decoder.bias.data.zero_()  # PEFT drops it where a tied head follows its embedding
    return model.eval()


def outputs(model: Any) -> Tensor:
    """On ids among which are the new ones."""
    ids = torch.tensor([[4, 64, 67, 9, 5], [64, 64, 10, 71, 67]])
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    found: Tensor = model(**batch).logits
    return found


def settings(family: str, **more: Any) -> dict[str, Any]:
    targets = {"gpt2": ["c_attn"], "bert": ["query"], "t5": ["q"]}.get(family, ["q_proj"])
    return {"r": 2, "lora_alpha": 3, "target_modules": targets, "trainable_token_indices": NEW, **more}


def adapted(family: str, **more: Any) -> Any:
    model = resized(family)
    attach(model, LoraConfig(**settings(family, **more)))
    randomise(learned(model))
    return model


@FAMILIES
def test_only_the_rows_learn_and_at_the_start_nothing_changes(family: str) -> None:
    model = resized(family).requires_grad_(False)
    before, rows = outputs(model), model.get_input_embeddings().weight
    bits = rows.clone()
    planned = plan_parameters(LoraConfig(**settings(family)), module_shapes(model), 1).trainable
    summary = attach(model, LoraConfig(**settings(family)))
    assert summary.trainable == planned
    assert torch.equal(outputs(model), before)
    alone = sum(p.numel() for n, p in learned(model) if n.endswith(".change"))
    assert alone == len(NEW) * rows.shape[1], "tied heads have no rows of their own"
    randomise(learned(model))
    outputs(model).square().mean().backward()
    assert rows.grad is None
    assert not torch.equal(outputs(model), before)
    with disabled(model):
        assert torch.equal(outputs(model), before)
    detach(model)
    assert torch.equal(outputs(model), before)
    assert torch.equal(rows, bits)


@FAMILIES
def test_it_is_a_model_whose_table_has_these_rows(family: str) -> None:
    """The oracle writes them into a copy of the base, which its tied head then has too."""
    model = adapted(family, target_modules=[])
    oracle = resized(family)
    (share,) = [s for s in shares(model, "default").values() if s.saved(oracle.get_input_embeddings())]
    with torch.no_grad():
        oracle.get_input_embeddings().weight[NEW] += share.change
    expected = outputs(oracle)
    torch.testing.assert_close(outputs(model), expected)
    with folding(model):
        torch.testing.assert_close(outputs(model), expected)
    merge(model)
    torch.testing.assert_close(outputs(model), expected)
    unmerge(model)
    state = merged_state(model)
    bare = resized(family, seed=9)
    bare.load_state_dict(state)
    torch.testing.assert_close(outputs(bare), expected)


def in_peft(family: str, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(resized(family), peft.LoraConfig(**settings(family, **more))).eval()
    randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    return model


@FAMILIES
def test_files_of_peft_and_ours_are_the_same_adapter(family: str, tmp_path: Path) -> None:
    theirs = in_peft(family)
    expected = outputs(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = resized(family, seed=1)  # with other random new rows: the file's count
    load_adapter(ours, tmp_path / "theirs")
    again = resized(family)
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(outputs(again), expected, rtol=1e-5, atol=1e-5)
    name = next(n for n, s in shares(ours, "default").items() if isinstance(ours.get_submodule(n), TrainedTokens))
    key = f"base_model.model.{name}.{ROWS}"
    torch.testing.assert_close(
        shares(ours, "default")[name].saved(ours.get_submodule(name).base)[ROWS],
        load_file(tmp_path / "theirs" / "adapter_model.safetensors")[key],
    )
    save_adapter(again, tmp_path / "ours")
    files = [load_file(tmp_path / w / "adapter_model.safetensors") for w in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    back = peft.PeftModel.from_pretrained(resized(family), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(back), expected, rtol=1e-5, atol=1e-5)


def test_a_head_of_its_own_is_named_and_trained_apart(tmp_path: Path) -> None:
    rows = {"embed_tokens": NEW, "lm_head": [66]}
    theirs = in_peft("llama", trainable_token_indices=rows)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = resized("llama")
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["phi", "bert"])
def test_a_heads_bias_learns_beside_its_rows(family: str, tmp_path: Path) -> None:
    """The oracle has rows and bias written into it: PEFT trains and saves the same, but computes its head without a bias."""
    rows: Any = {"embed_tokens": NEW, "lm_head": [66]} if family == "phi" else NEW
    asked = {"trainable_token_indices": rows, "bias": "all"}
    model, oracle = adapted(family, **asked), resized(family)
    theirs = in_peft(family, **asked)
    planned = plan_parameters(LoraConfig(**settings(family, **asked)), module_shapes(oracle), 1).trainable
    assert trainable_summary(model).trainable == planned == theirs.get_nb_trainable_parameters()[0]
    name = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    expected = outputs(model)
    with torch.no_grad():
        oracle.load_state_dict(merged_state(model))
        bias = resized(family).get_submodule(name).bias + model.get_submodule(name).shares["default"].bias_change
    torch.testing.assert_close(oracle.get_output_embeddings().bias, bias)
    torch.testing.assert_close(outputs(oracle), expected, rtol=1e-5, atol=1e-5)
    with folding(model):
        torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    files = [load_file(tmp_path / w / "adapter_model.safetensors") for w in ("theirs", "ours")]
    assert {key for key in files[0] if not key.endswith("cls.predictions.bias")} == files[1].keys()
    again = resized(family)
    load_adapter(again, tmp_path / "ours")
    torch.testing.assert_close(outputs(again), expected, rtol=1e-5, atol=1e-5)
    load_adapter(resized(family), tmp_path / "theirs")


def test_several_adapters_change_their_tokens_together() -> None:
    model = resized("llama-tied")
    attach(model, LoraConfig(**settings("llama", target_modules=[], trainable_token_indices=[64, 5])), "one")
    attach(model, LoraConfig(**settings("llama", target_modules=[], trainable_token_indices=[5, 67])), "two")
    activate(model, {"one": 1.0, "two": -0.5})
    randomise(learned(model))
    table = model.model.embed_tokens.base.weight.clone()
    for name, weight in (("one", 1.0), ("two", -0.5)):
        share = shares(model, name)["model.embed_tokens"]
        table[share.tokens] += weight * share.change.detach()
    torch.testing.assert_close(model.model.embed_tokens(torch.arange(72)), table)
    torch.testing.assert_close(model.lm_head(torch.eye(32)), table.T)
    merge(model)
    torch.testing.assert_close(model.model.embed_tokens(torch.arange(72)), table)


def test_a_tied_model_keeps_its_fused_path() -> None:
    model = adapted("llama-tied")
    decoder = describe(model)
    assert isinstance(decoder, Decoder)
    ids = torch.tensor([[4, 64, 67, 9, 5]])
    hidden = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(decoder.head(hidden), model(input_ids=ids).logits)


def test_bfloat16_rows_are_float32_and_rounded_once() -> None:
    model = resized("llama-tied").to(torch.bfloat16)
    attach(model, LoraConfig(**settings("llama", target_modules=[])))
    randomise(learned(model))
    layer = model.model.embed_tokens
    assert {p.dtype for _, p in learned(model)} == {torch.float32}
    exact = layer.base.weight[NEW].double() + layer.shares["default"].change.double()
    assert torch.equal(layer(torch.tensor(NEW)), exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"trainable_token_indices": [99]}, "token 99 is beyond 'model.embed_tokens', which has 72; resize"),
        ({"trainable_token_indices": {"embed_tokens": []}}, "of 'model.embed_tokens' names no token; leave it out"),
        ({"trainable_token_indices": [5, 5]}, "names a token twice"),
        ({"trainable_token_indices": {"embed_token": [5]}}, "matches no module; did you mean 'embed_tokens'"),
        ({"trainable_token_indices": {"norm": [5]}}, "neither an embedding nor a linear head"),
        ({"target_modules": ["embed_tokens"]}, "in both target_modules and trainable_token_indices"),
        ({"target_modules": ["lm_head"]}, "'lm_head' is in both target_modules and trainable_token_indices"),
        (
            {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [6]}, "ensure_weight_tying": True},
            "'lm_head' and 'model.embed_tokens' have one weight",
        ),
        (
            {"trainable_token_indices": None, "target_modules": ["lm_head"], "ensure_weight_tying": True},
            "'lm_head' and 'model.embed_tokens' have one weight",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        attach(resized("llama-tied"), LoraConfig(**settings("llama", **more)))


def test_an_adapter_over_a_larger_vocabulary_says_so(tmp_path: Path) -> None:
    save_adapter(adapted("llama"), tmp_path / "a")
    with pytest.raises((AdapterFileError, TargetError), match="resize"):
        load_adapter(build_model("llama"), tmp_path / "a")


def test_an_adapted_head_of_a_tied_model_leaves_the_embedding_alone() -> None:
    model = build_model("llama-tied")
    table = model.model.embed_tokens.weight.clone()
    attach(model, LoraConfig(r=2, target_modules=("lm_head",)))
    randomise(learned(model))
    expected = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), expected)
    state = merged_state(model)
    assert torch.equal(state["model.embed_tokens.weight"], table)
    assert not torch.equal(state["lm_head.weight"], table)


def test_a_plain_module_trains_rows_of_its_embedding(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))

    model = make()
    attach(model, LoraConfig(r=2, target_modules=[], trainable_token_indices=[8, 1]))
    assert trainable_summary(model).trainable == 8
    randomise(learned(model))
    ids = torch.arange(9)
    save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["trainable_token_indices"] == [8, 1]
    other = make()
    unchanged = other(ids)
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other(ids), model(ids))
    same = [i for i in range(9) if i not in (8, 1)]
    assert torch.equal(other(ids)[same], unchanged[same])
