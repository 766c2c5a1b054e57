"""Training over a packed base, through the same recipe: step 0, what is written, resuming, merging, PEFT."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_base import gpt2, llama
from tiny_runs import adapter_tensors, changed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from twofold.adapter.attach import attach, detach, disabled, merge, shares, trainable_summary
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, save_adapter
from twofold.base.blocks import Decoder, describe
from twofold.base.load import load_base
from twofold.data.examples import DataConfig
from twofold.errors import AdapterFileError, ConfigError
from twofold.layers.quantised import QuantisedLinear, packed_as, values_of
from twofold.planning.memory import QUANTIZED_BYTES
from twofold.quant import Scheme, roundtrip
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.merge import merge_checkpoint
from twofold.recipes.proof import base_digest
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.train import train
from twofold.training.optim import TrainingConfig

pytest_plugins = ("tiny_fixtures",)
SCHEMES = pytest.mark.parametrize("scheme", [Scheme("nf4"), Scheme("int8")], ids=str)
IDS = torch.arange(3, 23).view(2, 10)


def packed(folder: Path, scheme: Scheme, dtype: Any = "float32") -> Any:
    return load_base(str(folder), dtype, "cpu", quantization=scheme)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def unpacked(folder: Path, scheme: Scheme) -> Any:
    """The 16-bit model with each linear weight but the head's sent through packing by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.data = roundtrip(module.weight.data, scheme)
        elif type(module).__name__ == "Conv1D":
            module.weight.data = roundtrip(module.weight.data.T.contiguous(), scheme).T
    return model


# ------------------------------------------------------------------------------------------- loading


@SCHEMES
@pytest.mark.parametrize("which", ["llama_base", "gpt2_base", "tied_base"])
def test_a_packed_base_computes_what_its_unpacked_weights_do(
    which: str, scheme: Scheme, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    base = packed(folder, scheme)
    torch.testing.assert_close(logits(base.model), logits(unpacked(folder, scheme)), rtol=1e-5, atol=1e-5)
    assert (logits(base.model) - logits(AutoModelForCausalLM.from_pretrained(folder).eval())).abs().max() > 1e-3


def test_embeddings_norms_and_head_stay_what_they_are(llama_base: Path) -> None:
    model = packed(llama_base, Scheme("nf4"), "bfloat16").model
    kinds = {n.rsplit(".", 1)[-1]: type(m).__name__ for n, m in model.named_modules() if not [*m.children()]}
    assert kinds["q_proj"] == kinds["down_proj"] == "QuantisedLinear"
    assert kinds["lm_head"] == "Linear"
    assert {p.dtype for n, p in model.named_parameters() if "proj" not in n} == {torch.bfloat16}


def test_the_fingerprint_is_that_of_the_source(llama_base: Path, gpt2_base: Path, tied_base: Path) -> None:
    for folder in (llama_base, gpt2_base, tied_base):
        assert packed(folder, Scheme("nf4")).fingerprint == load_base(str(folder), "float32", "cpu").fingerprint


def test_nf4_takes_the_bytes_that_the_planner_says(llama_base: Path) -> None:
    model = packed(llama_base, Scheme("nf4")).model
    linear = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    values = sum(m.in_features * m.out_features for m in linear)
    held = sum(t.nbytes for m in linear for n, t in m.state_dict().items() if n != "nested_levels")
    blocks_filled_up = 12 * len(linear)
    assert held == pytest.approx(QUANTIZED_BYTES["nf4"] * values, abs=blocks_filled_up)
    assert values_of(model) == sum(p.numel() for p in llama(model.config.vocab_size).parameters())


# ------------------------------------------------------------------------------------------ adapters


@SCHEMES
@pytest.mark.parametrize("which", ["llama_base", "gpt2_base"])
def test_at_the_start_the_adapted_model_is_the_packed_base_bit_for_bit(
    which: str, scheme: Scheme, request: pytest.FixtureRequest
) -> None:
    model = packed(request.getfixturevalue(which), scheme, "bfloat16").model
    before, digest = logits(model), base_digest(model)
    summary = trainable_summary(model)
    attached = attach(model, LoraConfig(r=4))
    assert torch.equal(logits(model), before)
    assert attached.base == summary.base == values_of(model) - attached.trainable
    with disabled(model):
        assert torch.equal(logits(model), before)
    detach(model)
    assert base_digest(model) == digest
    assert packed_as(model) == scheme


@SCHEMES
def test_the_adapter_learns_what_it_would_over_the_unpacked_weights(scheme: Scheme, llama_base: Path) -> None:
    models = [packed(llama_base, scheme).model, unpacked(llama_base, scheme)]
    found = []
    for model in models:
        torch.manual_seed(0)
        attach(model, LoraConfig(r=4))
        torch.manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.05)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


VARIANTS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"use_dora": True, "init_lora_weights": "olora"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"lora_bias": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("which", ["llama_base", "gpt2_base"])
def test_a_variant_over_codes_is_that_over_the_values_they_stand_for(
    which: str, variant: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Starts, logits, gradients and merged weights, beside a dense model of the unpacked weights; and through a file."""
    folder, config = request.getfixturevalue(which), LoraConfig(r=4, **variant)
    models = [packed(folder, Scheme("nf4")).model, unpacked(folder, Scheme("nf4"))]
    before, digest = logits(models[0]), base_digest(models[0])
    gradients = []
    for model in models:
        torch.manual_seed(0)
        attach(model, config)
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    learned = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in models]
    assert learned[0].keys() == learned[1].keys()
    torch.manual_seed(1)
    for name, parameter in learned[0].items():
        assert parameter.shape == learned[1][name].shape
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        if name.endswith(".magnitude"):
            parameter.data.abs_()
    for (module, ours), theirs in zip(
        shares(models[0], "default").items(), shares(models[1], "default").values(), strict=True
    ):
        assert ours.state_dict().keys() == theirs.state_dict().keys(), module
        theirs.load_state_dict(ours.state_dict())
    for model in models:
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for name, ours, theirs in zip(learned[0], *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)
    moved = logits(models[1])
    assert (moved - before).abs().max() > 0.01
    torch.testing.assert_close(logits(models[0]), moved, rtol=1e-4, atol=1e-4)
    save_adapter(models[0], tmp_path / "a")
    other = packed(folder, Scheme("nf4")).model
    load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(logits(other), moved, rtol=1e-4, atol=1e-4)
    merge(models[0])
    torch.testing.assert_close(logits(models[0]), moved, rtol=1e-4, atol=1e-4)
    detach(models[0])
    assert base_digest(models[0]) == digest


@SCHEMES
def test_raw_factors_of_another_base_are_not_taken_off_codes(scheme: Scheme, llama_base: Path, tmp_path: Path) -> None:
    """PEFT's PiSSA starts from the 16-bit weights, which a packed base does not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama_base), config).save_pretrained(tmp_path / "raw")
    load_adapter(AutoModelForCausalLM.from_pretrained(llama_base), tmp_path / "raw")
    with pytest.raises(AdapterFileError, match="16-bit base"):
        load_adapter(packed(llama_base, scheme).model, tmp_path / "raw")


@pytest.mark.parametrize("adapter", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_a_run_of_a_variant_over_codes(config: TrainConfig, adapter: dict[str, Any]) -> None:
    report = train(replace(config, quantization="nf4", adapter=AdapterSettings(r=4, **adapter)))
    assert report["base_unchanged"]
    assert report["evaluation"]["adapter"]["loss"] < 0.8 * report["evaluation"]["base"]["loss"]
    assert report["verification"]["passed"]


def test_codes_are_not_trained_whole(llama_base: Path) -> None:
    model = packed(llama_base, Scheme("nf4")).model
    with pytest.raises(ConfigError, match="modules_to_save is quantised"):
        attach(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"]))


def test_the_fast_path_takes_packed_weights(llama_base: Path) -> None:
    model = packed(llama_base, Scheme("nf4")).model
    attach(model, LoraConfig(r=4))
    assert isinstance(describe(model), Decoder)


# ------------------------------------------------------------------------------------------ training


@SCHEMES
def test_a_run_learns_and_leaves_the_base_alone(scheme: Scheme, config: TrainConfig) -> None:
    report = train(replace(config, quantization=scheme.kind))
    assert report["base_unchanged"]
    assert report["quantization"] == scheme.kind
    assert report["evaluation"]["adapter"]["loss"] < 0.7 * report["evaluation"]["base"]["loss"]
    assert report["verification"]["passed"]


def test_a_resumed_run_has_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    quantised = replace(config, quantization="nf4")
    whole = train(quantised)
    halved = replace(quantised, output=str(tmp_path / "halved"))
    stopping = changed(halved, checkpoint_every=5)

    class Killed(Exception):
        pass

    def stop(event: Any) -> None:
        if getattr(event, "step", 0) == 8:
            raise Killed

    with pytest.raises(Killed):
        train(stopping, stop)
    resumed = train(stopping, resume=True)
    first, second = (adapter_tensors(r["adapter"]) for r in (whole, resumed))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_shards_and_codes_do_not_go_together(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="cannot be sharded"):
        replace(changed(config, parallel="shard"), quantization="nf4")


def test_gpt2_conv1d_counts_as_linear(gpt2_base: Path) -> None:
    model = packed(gpt2_base, Scheme("nf4")).model
    dense = gpt2(model.config.vocab_size)
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"])
    assert attach(model, config).trainable == attach(dense, config).trainable


# ------------------------------------------------------------------------------------------- merging


@pytest.fixture(scope="module")
def trained(wide_base: Path, train_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained over the NF4 form of a base."""
    settings = TrainConfig(
        base=str(wide_base),
        data=DataConfig(train=str(train_file)),
        adapter=AdapterSettings(r=4),
        training=TrainingConfig(batch_size=6, epochs=4, learning_rate=0.02),
        output=str(tmp_path_factory.mktemp("runs") / "nf4"),
        dtype="float32",
        device="cpu",
        quantization="nf4",
        verify=False,
    )
    return Path(train(settings)["adapter"])


def loaded(base: Path, adapter: Path, scheme: Scheme | None) -> Any:
    return load_with_adapters(str(base), [str(adapter)], "float32", "cpu", quantization=scheme)


def test_the_merge_is_into_the_16_bit_base_and_says_how_far_that_is(
    wide_base: Path, trained: Path, tmp_path: Path, cli: Any
) -> None:
    out = tmp_path / "merged"
    flags = ("--base", str(wide_base), "--adapter", str(trained), "--dtype", "float32", "--device", "cpu")
    done = cli("merge", *flags, "-o", str(out), "--json")
    found = json.loads(done.stdout)
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    exact, over_nf4 = loaded(wide_base, trained, None).model, loaded(wide_base, trained, Scheme("nf4")).model
    torch.testing.assert_close(logits(merged), logits(exact), rtol=1e-4, atol=1e-4)
    said = found["trained_over"]
    assert found["verification"]["passed"]
    assert said["quantization"] == "nf4"
    measured = (logits(merged) - logits(over_nf4)).abs().max().item()
    assert 0.2 * measured < said["max_abs_logit_difference"] < 5 * measured
    again = cli("merge", *flags, "-o", str(tmp_path / "again"))
    assert "trained over the nf4 form of this base" in " ".join(again.stdout.split())


def test_requantising_is_measured_and_bitsandbytes_reads_it(
    wide_base: Path, trained: Path, tmp_path: Path, cli: Any
) -> None:
    out = tmp_path / "packed"
    flags = ("--base", str(wide_base), "--adapter", str(trained), "--dtype", "float32", "--device", "cpu")
    found = json.loads(cli("merge", *flags, "--requantize", "-o", str(out), "--json").stdout)
    ours, theirs = load_base(str(out), "float32", "cpu").model, AutoModelForCausalLM.from_pretrained(out).train()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert packed_as(ours) == Scheme("nf4")
    apart = (logits(ours) - logits(loaded(wide_base, trained, Scheme("nf4")).model)).abs().max().item()
    assert 0.2 * apart < found["trained_over"]["max_abs_logit_difference"] < 5 * apart


def test_nothing_is_merged_into_codes(wide_base: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never into a quantised one"):
        merge_checkpoint(loaded(wide_base, trained, Scheme("nf4")), tmp_path / "merged")


def test_requantize_needs_to_know_how(llama_base: Path, config: TrainConfig, tmp_path: Path, cli: Any) -> None:
    report = train(changed(config, max_steps=1))
    flags = ("--base", str(llama_base), "--adapter", report["adapter"], "--dtype", "float32")
    done = cli("merge", *flags, "--requantize", "-o", str(tmp_path / "out"))
    assert "say how with --quantization" in done.refusal()
