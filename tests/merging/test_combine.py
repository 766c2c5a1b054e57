"""Combining adapters on disk: against dense float64 sums of their deltas, against the live model, and against PEFT."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build_model, inputs, logits
from safetensors.torch import load_file, save_file
from tiny_adapters import saved, with_tensors
from torch import Tensor
from warm_cli import WarmCli

import twofold
from twofold.adapter.files import load_adapter, open_adapter
from twofold.adapter.updates import updates_of
from twofold.errors import AdapterFileError, ConfigError
from twofold.events import Event, Warned
from twofold.merging.methods import METHODS
from twofold.merging.resize import Size
from twofold.recipes.inspect import inspect_adapter
from twofold.recipes.resize import resize

pytest_plugins = ("tiny_fixtures",)

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    "patterns": ("llama", {"r": 4, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 1}}),
    "one regular expression": ("llama", {"r": 3, "target_modules": r".*layers\.1.*(q|down)_proj"}),
    "some layers": ("llama", {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "all but some": ("llama", {"r": 3, "target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.o_proj"]}),
    "embedding": ("llama", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
    "bias of B": ("llama", {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "up_proj"]}),
    "biases": ("qwen2", {"r": 4, "bias": "lora_only"}),
    "all biases": ("qwen2", {"r": 4, "bias": "all", "target_modules": ["o_proj"]}),
    "whole modules": ("llama", {"r": 4, "modules_to_save": ["lm_head", "model.norm"]}),
    "tokens": ("llama", {"r": 4, "trainable_token_indices": [5, 9]}),
    "transposed": ("gpt2", {"r": 4}),
    "from the weights": ("llama", {"r": 3, "init_lora_weights": "pissa", "target_modules": ["q_proj"]}),
}  # fmt: skip


@cache
def sample(variant: str, folder: Path) -> tuple[Path, Tensor]:
    """An adapter of a variant, and the logits that it gives."""
    family, settings = VARIANTS[variant]
    path = saved(folder, family, **settings)
    model = build_model(family)
    load_adapter(model, path)
    return path, logits(model).detach()


def dense(path: Path) -> dict[str, Tensor]:
    """Every delta whole, in float64."""
    return {n: u.scale * u.B.double() @ u.A.double() for n, u in updates_of(open_adapter(path)).items()}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return float((found - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-30)


def weighted(parts: dict[Path, float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for path, weight in parts.items():
        for name, delta in dense(path).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_adapter_alone_stays_what_it_is(
    method: str, variant: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, expected = sample(variant, tmp_path_factory.getbasetemp())
    found = twofold.combine({path: 1.0}, tmp_path / "same", method=method)
    assert found["lost"] < 1e-9
    deltas = dense(path)
    for name, delta in dense(tmp_path / "same").items():
        assert close(delta, deltas.pop(name)), name
    assert not deltas
    model = build_model(VARIANTS[variant][0])
    load_adapter(model, tmp_path / "same")
    torch.testing.assert_close(logits(model).detach(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -1.5), (0.5, 0.0)])
def test_cat_is_the_weighted_sum_and_svd_its_best_part(weights: tuple[float, float], tmp_path: Path) -> None:
    first = saved(tmp_path, r=4, use_rslora=True, lora_alpha=5, target_modules=["q_proj", "v_proj", "up_proj"])
    second = saved(tmp_path, seed=3, r=2, target_modules=["q_proj", "down_proj"], alpha_pattern={"q_proj": 1})
    given = dict(zip((first, second), weights, strict=True))
    expected = weighted(given)
    twofold.combine(given, tmp_path / "cat")
    assert dense(tmp_path / "cat").keys() == expected.keys()
    for name, delta in dense(tmp_path / "cat").items():
        assert close(delta, expected[name]), name
    found = twofold.combine(given, tmp_path / "svd", method="svd", r=3)
    best = 0.0
    for module in found["modules"]:
        values = torch.linalg.svdvals(expected[module["name"]])
        missing = float((dense(tmp_path / "svd")[module["name"]] - expected[module["name"]]).square().sum())
        assert missing == pytest.approx(float(values[3:].square().sum()), rel=1e-4, abs=1e-9)
        assert module["lost"] * float(values.square().sum()) == pytest.approx(missing, rel=1e-4, abs=1e-9)
        assert module["off"] == pytest.approx(
            (missing / float(values.square().sum())) ** 0.5 if missing > 1e-9 else 0, rel=1e-3, abs=1e-5
        )
        best += float(values[3:].square().sum())
    assert found["lost"] == pytest.approx(
        best / sum(float(d.square().sum()) for d in expected.values()), rel=1e-4, abs=1e-9
    )


def test_the_live_model_says_the_same_as_the_files(tmp_path: Path) -> None:
    first, second = saved(tmp_path, r=4), saved(tmp_path, seed=5, r=3, target_modules=["q_proj", "o_proj"])
    model = build_model("llama")
    load_adapter(model, first, "a")
    load_adapter(model, second, "b")
    twofold.activate(model, {"a": 0.6, "b": -0.8})
    expected = logits(model).detach()
    twofold.combine({first: 0.6, second: -0.8}, tmp_path / "both")
    fresh = build_model("llama")
    load_adapter(fresh, tmp_path / "both")
    torch.testing.assert_close(logits(fresh).detach(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("all biases",)])
def test_peft_reads_what_is_written(variant: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path, _ = sample(variant, tmp_path_factory.getbasetemp())
    family = VARIANTS[variant][0]
    twofold.combine({path: 1.0}, tmp_path / "same", method="svd")
    ours = build_model(family)
    load_adapter(ours, tmp_path / "same")
    theirs = peft.PeftModel.from_pretrained(build_model(family), tmp_path / "same").eval()
    torch.testing.assert_close(theirs(**inputs(ours)).logits, logits(ours), rtol=1e-5, atol=2e-5)


def test_it_is_what_peft_makes_of_plain_adapters_by_a_dense_decomposition(tmp_path: Path) -> None:
    first, second = saved(tmp_path, r=4), saved(tmp_path, seed=5, r=4)
    model = peft.PeftModel.from_pretrained(build_model("llama"), first, "a")
    model.load_adapter(second, "b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="svd", svd_rank=5)
    twofold.combine({first: 0.7, second: 0.3}, tmp_path / "both", method="svd", r=5)
    ours = dense(tmp_path / "both")
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            assert close(ours[name], module.get_delta_weight("both").double(), 1e-4), name


def test_ties_and_dare_work_on_the_true_deltas(tmp_path: Path) -> None:
    paths = [saved(tmp_path, seed=s, r=2, target_modules=["q_proj"]) for s in (1, 2)]
    first, second = (dense(p) for p in paths)
    given = dict(zip(paths, (1.0, 0.5), strict=True))
    found = twofold.combine(given, tmp_path / "ties", method="ties", density=0.5, r=32)
    for name, delta in dense(tmp_path / "ties").items():
        parts = []
        for part, weight in ((first[name], 1.0), (second[name], 0.5)):
            least = (part * weight).abs().flatten().sort(descending=True).values[part.numel() // 2 - 1]
            parts.append(torch.where((part * weight).abs() >= least, part * weight, 0.0))
        total = parts[0] + parts[1]
        agree = [torch.where(p.sign() == total.sign(), p, 0.0) for p in parts]
        sizes = (agree[0] != 0) * 1.0 + (agree[1] != 0) * 0.5
        assert close(delta, torch.where(sizes > 0, (agree[0] + agree[1]) / sizes.clamp_min(0.1), 0.0) * 1.5, 1e-5)
    assert found["lost"] < 1e-9


def test_dare_keeps_a_share_of_the_entries_by_its_seed(tmp_path: Path) -> None:
    path = saved(tmp_path, r=2, target_modules=["q_proj"])
    outputs = [tmp_path / name for name in ("one", "again", "other")]
    for output, seed in zip(outputs, (4, 4, 5), strict=True):
        twofold.combine({path: 1.0}, output, method="dare_linear", density=0.25, r=32, seed=seed)
    for name, delta in dense(outputs[0]).items():
        whole = dense(path)[name]
        kept = delta.abs() > 1e-4 * whole.abs().max()
        assert 0.2 < float(kept.double().mean()) < 0.3
        assert torch.allclose(delta[kept], 4 * whole[kept], rtol=1e-3, atol=1e-4)
    one, again, other = ((o / "adapter_model.safetensors").read_bytes() for o in outputs)
    assert one == again != other


@pytest.mark.parametrize("method", PRUNING)
def test_what_a_method_loses_is_said(method: str, tmp_path: Path) -> None:
    given = {saved(tmp_path, seed=s, r=4, target_modules=["q_proj"]): 1.0 for s in (1, 2)}
    small = twofold.combine(given, None, method=method, density=0.5, r=2)
    whole = twofold.combine(given, tmp_path / "whole", method=method, density=0.5, r=32)
    assert whole["lost"] < 1e-9
    for one, module in zip(small["modules"], whole["modules"], strict=True):
        values = torch.linalg.svdvals(dense(tmp_path / "whole")[module["name"]])
        assert one["lost"] == pytest.approx(float(values[2:].square().sum() / values.square().sum()), rel=1e-3)


def test_linear_says_the_error_it_would_make(tmp_path: Path) -> None:
    first, second = (
        saved(tmp_path, r=4, target_modules=["q_proj"]),
        saved(tmp_path, seed=2, r=4, target_modules=["q_proj"]),
    )
    with pytest.raises(
        ConfigError, match=r"by 'linear' in 'model.layers.0.self_attn.q_proj': .* off by \d+% of the true sum"
    ):
        twofold.combine({first: 1.0, second: 1.0}, tmp_path / "out", method="linear")
    shared = {k: v for k, v in load_file(first / "adapter_model.safetensors").items() if "lora_A" in k}
    with_tensors(second, {k.removeprefix("base_model.model."): v for k, v in shared.items()})
    found = twofold.combine({first: 1.0, second: -2.0}, tmp_path / "out", method="linear")
    assert found["r"] == 4
    expected = weighted({first: 1.0, second: -2.0})
    assert all(close(delta, expected[name]) for name, delta in dense(tmp_path / "out").items())


# ---------------------------------------------------------------------------------------------- what is not factors


def test_whole_values_are_summed_as_changes_of_the_base(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 2, "bias": "lora_only", "target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    given = {saved(tmp_path, "qwen2", 1, **settings): 0.5, saved(tmp_path, "qwen2", 2, **settings): 0.25}
    with pytest.raises(ConfigError, match="do not add up to 1: the base's own values are needed; name it with --base"):
        twofold.combine(given, tmp_path / "out")
    build_model("qwen2").save_pretrained(tmp_path / "base")
    twofold.combine(given, tmp_path / "out", base=str(tmp_path / "base"))
    base = {n: p.detach() for n, p in build_model("qwen2").named_parameters()}
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    parts = [(load_file(p / "adapter_model.safetensors"), w) for p, w in given.items()]
    for key, parameter in (
        ("model.layers.0.self_attn.q_proj.base_layer.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("model.norm.weight", "model.norm.weight"),
    ):
        own = base[parameter]
        expected = own + sum(w * (held[f"base_model.model.{key}"] - own) for held, w in parts)
        torch.testing.assert_close(found[f"base_model.model.{key}"], expected)
    model = build_model("qwen2")
    load_adapter(model, tmp_path / "out")


def test_a_sum_beyond_its_type_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = path / "adapter_model.safetensors"
    save_file({k: v.half() for k, v in load_file(file).items()}, file)
    build_model("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(
        ConfigError, match=r"lm_head.weight' would hold NaN or infinity, for its values are beyond float16"
    ):
        twofold.combine({path: 1e6}, tmp_path / "out", base=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_biases_of_b_are_scaled_with_their_updates(tmp_path: Path) -> None:
    first = saved(tmp_path, r=4, lora_alpha=3, lora_bias=True, target_modules=["q_proj"])
    second = saved(tmp_path, seed=2, r=2, lora_alpha=10, target_modules=["q_proj", "v_proj"])
    twofold.combine({first: -0.5, second: 2.0}, tmp_path / "out")
    model, expected = build_model("llama"), build_model("llama")
    load_adapter(model, tmp_path / "out")
    load_adapter(expected, first, "a")
    load_adapter(expected, second, "b")
    twofold.activate(expected, {"a": -0.5, "b": 2.0})
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("gpt2", {"target_modules": ["c_attn"]}, {"target_modules": ["wte"]}),
        ("llama", {"init_lora_weights": "gaussian"}, {"lora_bias": True}),
    ],
)
def test_adapters_of_other_layers_and_starts_go_together(
    family: str, first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    a, b = (saved(tmp_path, family, seed, **given) for seed, given in ((1, first), (2, second)))
    twofold.combine({a: 1.0, b: 0.5}, tmp_path / "out")
    model, expected = build_model(family), build_model(family)
    load_adapter(model, tmp_path / "out")
    load_adapter(expected, a, "a")
    load_adapter(expected, b, "b")
    twofold.activate(expected, {"a": 1.0, "b": 0.5})
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=2e-5)


def test_what_only_a_training_needs_is_left_out(tmp_path: Path) -> None:
    path = saved(tmp_path, r=2, target_modules=["q_proj"])
    kept = load_file(path / "adapter_model.safetensors").keys()
    with_tensors(path, {"model.layers.0.self_attn.q_proj.lora_velora_embed": torch.ones(2)})
    twofold.combine({path: 0.5}, tmp_path / "out")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == kept


@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.k_proj.lora_X.weight", "norm.weight", "layers.0.self_attn.q_proj.lora_B.bias"]
)
def test_tensors_that_the_config_has_no_word_for_are_refused(name: str, tmp_path: Path) -> None:
    path = with_tensors(saved(tmp_path, r=2, target_modules=["q_proj"]), {f"model.{name}": torch.ones(32)})
    with pytest.raises(ConfigError, match=f"holds 'model.{name}', which is no part of the adapter"):
        twofold.combine({path: 1.0}, tmp_path / "out")
    with pytest.raises(ConfigError, match=f"holds 'model.{name}', which is no part of the adapter"):
        resize(path, tmp_path / "out", Size(r=1))
    assert "unknown-tensor" in [f.code for f in inspect_adapter(path).findings]


def test_a_copy_of_the_base_is_compared_with_it(tmp_path: Path) -> None:
    model = build_model("llama")
    model.save_pretrained(tmp_path / "base")
    own = model.get_input_embeddings().weight.detach().clone()
    path, key = saved(tmp_path, r=2, target_modules=["embed_tokens"]), "model.embed_tokens.base_layer.weight"
    with_tensors(path, {key: own})
    twofold.combine({path: 1.0}, tmp_path / "out", base=str(tmp_path / "base"))
    assert not any("base_layer" in k for k in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    with_tensors(path, {key: own + 1})
    with pytest.raises(AdapterFileError, match="that is not the base's, so it was trained over another one"):
        twofold.combine({path: 1.0}, tmp_path / "other", base=str(tmp_path / "base"))
    told: list[Event] = []
    twofold.combine({path: 1.0}, None, emit=told.append)
    assert any(isinstance(e, Warned) and "was not compared with the base" in e.text for e in told)


def test_it_is_of_the_first_ones_base_by_name_and_revision(tmp_path: Path) -> None:
    paths = []
    for seed, revision in enumerate(("v1", "v2")):
        paths.append(saved(tmp_path, r=2, seed=seed, target_modules=["q_proj"]))
        config = json.loads((paths[-1] / "adapter_config.json").read_text())
        told = {**config, "base_model_name_or_path": "some/base", "revision": revision}
        (paths[-1] / "adapter_config.json").write_text(json.dumps(told))
    events: list[Event] = []
    twofold.combine(dict.fromkeys(paths, 0.5), tmp_path / "out", emit=events.append)
    written = peft.LoraConfig.from_pretrained(tmp_path / "out")
    assert (written.base_model_name_or_path, written.revision) == ("some/base", "v1")
    assert any(isinstance(e, Warned) and "some/base@v1, some/base@v2" in e.text for e in events)


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_previews_writes_and_keeps_where_it_came_from(cli: WarmCli, tmp_path: Path) -> None:
    first, second = saved(tmp_path, r=4), saved(tmp_path, seed=2, r=2)
    both = (f"{first}:0.7", f"{second}:-0.3", "--method", "svd", "--r", 3)
    found = cli("combine", *both, "--preview", "--json").json()
    assert found["output"] is None
    (module, *_) = found["modules"]
    x, y = (dense(p)[module["name"]] for p in (first, second))
    assert module["cosine"] == pytest.approx(-float((x * y).sum() / x.norm() / y.norm()), abs=1e-6)
    whole = 0.7 * x - 0.3 * y
    cancelled = 1 - float(whole.abs().sum() / (0.7 * x.abs() + 0.3 * y.abs()).sum())
    assert module["conflict"] == pytest.approx(cancelled, abs=1e-5)
    (u, _, _), (v, _, _) = torch.linalg.svd(x), torch.linalg.svd(y)
    assert module["overlap"] == pytest.approx(float((u[:, :4].T @ v[:, :2]).square().sum()) / 2, abs=1e-6)
    assert module["by_chance"] == pytest.approx(4 / x.shape[0])
    written = cli("combine", *both, "-o", tmp_path / "out", "--json").json()
    assert written["modules"] == found["modules"]
    ours = json.loads((tmp_path / "out" / "twofold.json").read_text())
    assert [s["weight"] for s in ours["training"]["combined"]["from"]] == [0.7, -0.3]
    assert str(tmp_path) not in (tmp_path / "out" / "twofold.json").read_text()
    assert "of the energy lost" in cli("combine", *both, "--preview").stdout
    assert "name the folder to write with -o" in cli("combine", *both).refusal()
    assert "is named twice" in cli("combine", first, first, "--preview").refusal()
