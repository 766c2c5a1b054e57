"""PEFT as oracle: the same adapter gives the same logits and the same gradients there and here, on every family."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import CAUSAL, FAMILIES, build_model, inputs, logits, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twofold.adapter.attach import activate, adapter_layers, attach, shares
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, save_adapter
from twofold.errors import AdapterFileError
from twofold.layers.embedding import EmbeddingShare
from twofold.layers.linear import LinearShare
from twofold.layers.saved import BiasShare, CopyShare

EMBEDDINGS = {"gpt2": ["wte"], "bert": ["word_embeddings"], "bert-classifier": ["word_embeddings"]}
LINEARS = {"phi3": ["qkv_proj"], "gpt2": ["c_attn"], "bert": ["query"], "bert-classifier": ["query"], "t5": ["q"]}
WHOLE = {"gpt2": ["ln_f"], "opt": ["final_layer_norm"], "phi": ["final_layernorm"]} | {
    "bert": ["LayerNorm"],
    "bert-classifier": ["classifier"],
    "t5": ["wo"],
}


def embeddings_of(family: str) -> list[str]:
    return EMBEDDINGS.get(family, ["embed_tokens"])


def linears_of(family: str) -> list[str]:
    return LINEARS.get(family, ["q_proj"])


@dataclass(frozen=True)
class Case:
    """Settings that PEFT's LoraConfig and ours take alike."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def of(self, family: str) -> dict[str, Any]:
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **self.settings}
        if self.name == "embedding":
            settings["target_modules"] = [*linears_of(family), *embeddings_of(family)]
        if self.name == "embedding alone":
            settings["target_modules"] = embeddings_of(family)
        if self.name == "whole module":
            settings["target_modules"] = linears_of(family)
            settings["modules_to_save"] = WHOLE.get(family, ["lm_head"])
        if family == "bert-classifier":
            settings["modules_to_save"] = ["classifier"]
        return settings


PATTERNS = {"rank_pattern": {r"0\..*": 2, r"1\..*": 6}, "alpha_pattern": {r"0\..*": 5, r"1\..*": 3}}
CASES = [
    Case("plain"),
    Case("rslora", {"use_rslora": True}),
    Case("patterns", PATTERNS),
    Case("patterns and rslora", {**PATTERNS, "use_rslora": True}),
    Case("bias of all", {"bias": "all"}),
    Case("bias of adapted", {"bias": "lora_only"}),
    Case("gaussian", {"init_lora_weights": "gaussian"}),
    Case("embedding"),
    Case("embedding alone"),
    Case("whole module"),
]


TIED = {"cls.predictions.bias": "cls.predictions.decoder.bias"}
"""One parameter of BERT under two names: `named_parameters` says the first, Twofold's adapters the one that is used."""
SECOND_NAMES = ("classifier.modules_to_save.bias", "classifier.original_module.bias", *TIED)
"""What PEFT also calls biases that it writes already, with `bias: all`."""


def grid(cases: list[Case]) -> Any:
    pairs = [(f, c) for f in FAMILIES for c in cases]
    return pytest.mark.parametrize(("family", "case"), [pytest.param(f, c, id=f"{f}-{c.name}") for f, c in pairs])


GRID = grid(CASES)


def in_peft(family: str, settings: dict[str, Any]) -> Any:
    """A PEFT model with random values in everything that learns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = "SEQ_CLS" if family == "bert-classifier" else None  # which keeps the classifier out of `all-linear`
        model = peft.get_peft_model(build_model(family), peft.LoraConfig(task_type=task, **settings)).eval()
    _randomise_in_peft(model)
    return model


def _randomise_in_peft(model: Any) -> None:
    learned = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    before = {n: p.detach().clone() for n, p in learned}
    randomise(learned)
    with torch.no_grad():
        for name, parameter in learned:
            if "lora_" not in name:
                parameter.copy_(before[name] + parameter * 0.1)


def saved_by_peft(model: Any, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


def opened_in_peft(family: str, path: Path) -> Any:
    """The folder opened by PEFT, which must not find anything missing or left over."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(build_model(family), path, is_trainable=True).eval()
    assert not [str(w.message) for w in said if "key" in str(w.message)]
    return model


def keys_in(path: Path) -> set[str]:
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


@GRID
def test_peft_adapter_gives_the_same_logits_here(family: str, case: Case, tmp_path: Path) -> None:
    theirs = in_peft(family, case.of(family))
    expected = logits(theirs)
    ours = build_model(family)
    bare = logits(ours)
    load_adapter(ours, saved_by_peft(theirs, tmp_path / "a"))
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(bare, expected, atol=1e-3), "the adapter should change something"


@GRID
def test_our_adapter_gives_the_same_logits_in_peft(family: str, case: Case, tmp_path: Path) -> None:
    ours = build_model(family)
    attach(ours, LoraConfig(**case.of(family)))
    learned = [(n, p) for n, p in ours.named_parameters() if p.requires_grad]
    before = {n: p.detach().clone() for n, p in learned}
    randomise(learned)
    with torch.no_grad():
        for name, parameter in learned:
            if ".module." in name:
                parameter.copy_(before[name] + parameter * 0.1)
    save_adapter(ours, tmp_path / "a")
    theirs = opened_in_peft(family, tmp_path / "a")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)


@grid([c for c in CASES if "embedding" not in c.name])
def test_our_file_has_exactly_the_tensors_of_peft(family: str, case: Case, tmp_path: Path) -> None:
    theirs = saved_by_peft(in_peft(family, case.of(family)), tmp_path / "theirs")
    ours = build_model(family)
    attach(ours, LoraConfig(**case.of(family)))
    expected = {key for key in keys_in(theirs) if not key.endswith(SECOND_NAMES)}
    assert keys_in(save_adapter(ours, tmp_path / "ours")) == expected


@pytest.mark.parametrize(("family", "name"), [("bert-classifier", n) for n in SECOND_NAMES[:2]] + [("bert", *TIED)])
def test_a_second_name_must_say_what_the_first_says(family: str, name: str, tmp_path: Path) -> None:
    (case,) = [c for c in CASES if c.name == "bias of all"]
    path = saved_by_peft(in_peft(family, case.of(family)), tmp_path / "a") / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{name}"] += 1
    save_file(tensors, path)
    with pytest.raises(AdapterFileError, match=f"unexpected tensor 'base_model.model.{name}'"):
        load_adapter(build_model(family), tmp_path / "a")


@pytest.mark.parametrize("saved", [["norm"], ["model.norm"], ["input_layernorm", "norm"]], ids=" ".join)
def test_a_norm_trained_whole_is_the_same_one_in_peft(saved: list[str], tmp_path: Path) -> None:
    """PEFT takes `norm` for the end of `input_layernorm` too, so the file has to say it in full."""
    ours = build_model("llama")
    attach(ours, LoraConfig(r=2, modules_to_save=saved))
    randomise([(n, p) for n, p in ours.named_parameters() if p.requires_grad], scale=0.1)
    theirs = opened_in_peft("llama", save_adapter(ours, tmp_path / "a"))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    again = build_model("llama")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(ours))


def step_loss(model: Any) -> Tensor:
    found: Tensor = model(**inputs(model)).logits
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
    return (torch.log_softmax(found, -1) * weights).sum()


def gradients_here(model: nn.Module) -> dict[str, Tensor]:
    """By PEFT's name of the parameter, without its adapter's name."""
    found: dict[str, Tensor | None] = {}
    for module, share in shares(model, "default").items():
        if isinstance(share, LinearShare):
            found |= {f"{module}.lora_A.weight": share.A.grad, f"{module}.lora_B.weight": share.B.grad}
            if share.bias_change is not None:
                found[f"{module}.base_layer.bias"] = share.bias_change.grad
        elif isinstance(share, EmbeddingShare):
            found |= {f"{module}.lora_embedding_A": share.A.grad, f"{module}.lora_embedding_B": share.B.grad}
        elif isinstance(share, BiasShare):
            found[f"{module}.bias"] = share.bias_change.grad
        elif isinstance(share, CopyShare):
            found |= {f"{module}.{n}": p.grad for n, p in share.module.named_parameters()}
    return {n: g for n, g in found.items() if g is not None}


def gradients_in_peft(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            bare = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            bare = bare.replace(".default", "")
            found[TIED.get(bare, bare)] = parameter.grad
    return found


@GRID
def test_gradients_of_a_step_are_those_of_peft(family: str, case: Case, tmp_path: Path) -> None:
    """In float64 (but for norms that transformers computes in float32), where no wrong formula hides in rounding."""
    path = saved_by_peft(in_peft(family, case.of(family)), tmp_path / "a")
    theirs, ours = peft.PeftModel.from_pretrained(build_model(family), path, is_trainable=True), build_model(family)
    load_adapter(ours, path)
    step_loss(theirs.double().eval()).backward()
    step_loss(ours.double()).backward()
    expected, found = gradients_in_peft(theirs), gradients_here(ours)
    assert set(found) == set(expected)
    largest = max(float(g.norm()) for g in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-7 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_float32_are_those_of_peft(family: str, tmp_path: Path) -> None:
    theirs = in_peft(family, CASES[0].of(family))
    ours = build_model(family)
    load_adapter(ours, saved_by_peft(theirs, tmp_path / "a"))
    step_loss(theirs).backward()
    step_loss(ours).backward()
    expected, found = gradients_in_peft(theirs), gradients_here(ours)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 3e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_means_the_same_modules(family: str) -> None:
    theirs = in_peft(family, {"r": 2, "target_modules": "all-linear"})
    ours = build_model(family)
    attach(ours, LoraConfig(r=2, target_modules="all-linear"))
    expected = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {name for name, _ in adapter_layers(ours)} == expected


@GRID
def test_rank_scale_and_trainable_count_are_those_of_peft(family: str, case: Case) -> None:
    theirs = in_peft(family, case.of(family))
    ours = build_model(family)
    summary = attach(ours, LoraConfig(**case.of(family)))
    assert summary.trainable == theirs.get_nb_trainable_parameters()[0]
    expected = {
        n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for n, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    found = {
        n: (s.A.shape[0], s.scale)
        for n, s in shares(ours, "default").items()
        if isinstance(s, LinearShare | EmbeddingShare)
    }
    assert found == expected


@pytest.mark.parametrize("family", CAUSAL)
def test_the_trained_head_of_peft_loads_whole(family: str, tmp_path: Path) -> None:
    """Adapting the head by name, which `all-linear` leaves out; PEFT then saves base embeddings beside it."""
    settings = {"r": 4, "target_modules": [*linears_of(family), "lm_head"]}
    theirs = in_peft(family, settings)
    ours = build_model(family)
    load_adapter(ours, saved_by_peft(theirs, tmp_path / "a"))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_several_adapters_of_peft_sum_up(tmp_path: Path) -> None:
    theirs = in_peft("llama", {"r": 4, "target_modules": ["q_proj", "up_proj"]})
    theirs.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    randomise([(n, p) for n, p in theirs.named_parameters() if "second" in n], seed=5)
    saved_by_peft(theirs, tmp_path / "a")
    theirs.base_model.set_adapter(["default", "second"])
    ours = build_model("llama")
    load_adapter(ours, tmp_path / "a", "first")
    load_adapter(ours, tmp_path / "a" / "second", "second")
    activate(ours, {"first": 1.0, "second": 1.0})
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_bf16_base_takes_the_fp32_adapter_of_peft(tmp_path: Path) -> None:
    base = build_model("llama").to(torch.bfloat16)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    _randomise_in_peft(theirs)
    saved_by_peft(theirs, tmp_path / "a")
    ours = build_model("llama").to(torch.bfloat16)
    load_adapter(ours, tmp_path / "a")
    assert next(iter(shares(ours, "default").values())).A.dtype is torch.float32
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0.05, atol=0.05)


def test_our_config_holds_nothing_that_peft_would_drop(tmp_path: Path) -> None:
    ours = build_model("llama")
    attach(ours, LoraConfig(target_modules="attention", rank_pattern={"q_proj": 3}))
    save_adapter(ours, tmp_path / "a", base_name="some/base")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    read = peft.LoraConfig.from_pretrained(tmp_path / "a").to_dict()
    assert set(written) <= set(read)
    for key, value in written.items():
        if key != "target_modules":
            assert read[key] == value, key
    assert set(read["target_modules"]) == set(written["target_modules"])
