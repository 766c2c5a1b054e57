"""`inspect --base`, its lint and its page: against dense linear algebra of the whole weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_report_page import Page
from torch import Tensor
from warm_cli import WarmCli

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import Provenance, open_adapter, save_adapter
from twofold.adapter.shapes import module_shapes
from twofold.adapter.updates import updates_of
from twofold.base.fingerprint import fingerprint
from twofold.base.load import load_base
from twofold.errors import ConfigError
from twofold.inspection.against_base import lint_against
from twofold.recipes.export import Format, export_adapter
from twofold.recipes.inspect import inspect_adapter

pytest_plugins = ("tiny_fixtures",)
FILE = "adapter_model.safetensors"


def adapter(folder: Path, output: Path, loud: float = 0.1, known: bool = True, **settings: Any) -> Path:
    base = load_base(str(folder), "float32", "cpu")
    attach(base.model, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    generator = torch.Generator().manual_seed(1)
    for parameter in base.model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * loud
    return save_adapter(base.model, output, provenance=Provenance(base=base.fingerprint.as_json()) if known else None)


def weights(folder: Path) -> dict[str, Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {n: p.detach().double() for n, p in model.named_parameters()}


def codes(path: Path, base: Path | None = None) -> dict[str, str]:
    return {f.code: f.message for f in inspect_adapter(path, base and str(base)).findings}


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ["q_proj", "down_proj", "embed_tokens"]), ("gpt2", ["c_attn", "c_fc"])]
)
def test_sizes_and_amplification_are_those_of_the_whole_weights(
    family: str, targets: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(f"{family}_base")
    path = adapter(base, tmp_path / "adapter", target_modules=targets)
    report, whole, updates = inspect_adapter(path, str(base)), weights(base), updates_of(open_adapter(path))
    assert [f.code for f in report.findings if f.severity == "error"] == []
    for module in report.modules:
        W, update = whole[f"{module.name}.weight"], updates[module.name]
        W = W.T if family == "gpt2" or "embed" in module.name else W
        delta = update.scale * update.B.double() @ update.A.double()
        u, values, vh = torch.linalg.svd(delta)
        own = float((u[:, :4].T @ W @ vh[:4].T).norm())
        found = module.beside_base
        assert found is not None
        assert found.relative_norm == pytest.approx(float(delta.norm() / W.norm()), rel=1e-4)
        assert found.amplification == pytest.approx(float(delta.norm()) / own, rel=1e-3)
        assert found.relative_spectral_norm == pytest.approx(float(values[0] / torch.linalg.svdvals(W)[0]), rel=0.05)


@pytest.mark.parametrize("loud", [0.01, 1.0])
def test_intruders_are_those_of_a_dense_decomposition(loud: float, llama_base: Path, tmp_path: Path) -> None:
    path = adapter(llama_base, tmp_path / "adapter", loud=loud)
    whole, updates = weights(llama_base), updates_of(open_adapter(path))
    total = exact_total = 0
    for module in inspect_adapter(path, str(llama_base), intruders=4).modules:
        W, update = whole[f"{module.name}.weight"], updates[module.name]
        changed = W + update.scale * update.B.double() @ update.A.double()
        y = torch.linalg.svd(changed).U[:, :4]
        likeness = (torch.linalg.svd(W, full_matrices=False).U.T @ y).abs().amax(0)
        assert module.beside_base is not None
        assert module.beside_base.likeness is not None
        total += module.beside_base.intruders or 0
        exact_total += int((likeness < 0.5).sum())
    assert total == pytest.approx(exact_total, abs=2)
    assert (exact_total > 20) == (loud == 1.0)


@pytest.fixture(scope="module")
def falling_base(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama too wide to be decomposed whole, whose singular values fall off."""
    folder = tmp_path_factory.mktemp("bases") / "falling"
    config = transformers.AutoConfig.from_pretrained(llama_base)
    config.update({"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 96})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in (p for p in model.parameters() if p.dim() == 2):
        weight.data *= torch.arange(1, weight.shape[1] + 1.0).pow(-0.5)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(llama_base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loud", [0.0, 1e-4, 3.0])
def test_sizes_are_the_same_where_intruders_are_asked_for(loud: float, falling_base: Path, tmp_path: Path) -> None:
    path = adapter(falling_base, tmp_path / "adapter", loud=loud, r=64)
    whole, updates = weights(falling_base), updates_of(open_adapter(path))
    for module in inspect_adapter(path, str(falling_base), intruders=4).modules:
        found, update = module.beside_base, updates[module.name]
        assert found is not None
        largest = torch.linalg.matrix_norm(update.scale * update.B.double() @ update.A.double(), 2)
        of_weight = torch.linalg.matrix_norm(whole[f"{module.name}.weight"], 2)
        assert found.relative_spectral_norm == pytest.approx(float(largest / of_weight), rel=0.05)
        assert found.intruders == 0 or loud


def test_a_total_is_that_of_one_large_matrix(llama_base: Path, tmp_path: Path) -> None:
    path = adapter(llama_base, tmp_path / "adapter")
    values = torch.cat(
        [
            torch.linalg.svdvals(u.scale * u.B.double() @ u.A.double())[:4]
            for u in updates_of(open_adapter(path)).values()
        ]
    )
    total, energy = inspect_adapter(path).total, values.sort(descending=True).values.square().cumsum(0)
    assert total is not None
    assert (total.modules, total.r) == (14, 56)
    assert total.frobenius_norm == pytest.approx(float(values.norm()))
    assert total.spectral_norm == pytest.approx(float(values.max()))
    assert total.stable_rank == pytest.approx(float(values.square().sum() / values.max() ** 2))
    assert total.energy_rank_95 == int((energy < 0.95 * energy[-1]).sum()) + 1


# ---------------------------------------------------------------------------------------------- lint


def changed(path: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """An adapter whose files were written by somebody else."""
    said = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**said, **config}))
    save_file({**load_file(path / FILE), **(tensors or {})}, path / FILE)
    return path


def test_a_sound_adapter_on_its_base_has_nothing_but_notes(llama_base: Path, other_base: Path, tmp_path: Path) -> None:
    path = adapter(llama_base, tmp_path / "adapter", r=8)
    assert codes(path) == codes(path, llama_base) == {}
    assert "trained on a base with other weights" in codes(path, other_base)["foreign-base"]
    unknown = adapter(llama_base, tmp_path / "unknown", r=8, known=False)
    assert list(codes(unknown, other_base)) == ["no-fingerprint"]


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"r": 6}, "vllm-rank", "needs --max-lora-rank 8"),
        (
            {"r": 20, "rank_pattern": {".*": 2}},
            "vllm-rank",
            "rank 20 is filled up in vLLM, which needs --max-lora-rank 32",
        ),
        ({"use_dora": True}, "vllm-dora", "vLLM refuses adapters with DoRA"),
        ({"use_dora": True}, "gguf-dora", "GGUF adapters hold no DoRA"),
        ({"lora_bias": True}, "vllm-bias", "with biases"),
        ({"lora_bias": True}, "mlx-whole", "hold no biases or whole modules"),
        ({"modules_to_save": ["lm_head"]}, "vllm-whole-modules", "with modules_to_save"),
        ({"modules_to_save": ["lm_head"]}, "gguf-whole", "GGUF adapters hold no biases or whole modules"),
        ({"use_rslora": True}, "gguf-scale", "GGUF holds one alpha and no rsLoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "mlx-rank", "one rank and one scale"),
        ({"target_modules": ["embed_tokens"]}, "gguf-embedding", "no factors of an embedding"),
        ({"target_modules": ["embed_tokens"]}, "mlx-embedding", "no factors of an embedding"),
        ({"target_modules": ["embed_tokens"]}, "vllm-embedding", "with factors of an embedding"),
        ({"target_modules": ["lm_head", "q_proj"]}, "vllm-outside", "and lm_head lies outside"),
        ({"target_modules": ["lm_head", "q_proj"]}, "mlx-outside", "and lm_head lies outside"),
        ({"target_modules": ["lm_head", "q_proj"]}, "gguf-head", "no factors of 'lm_head' where it is the embedding"),
        ({"trainable_token_indices": [3]}, "mlx-tokens", "no tokens of its own"),
        ({"lora_alpha": 800}, "odd-scale", "has the scale 200"),
    ],
)
def test_limits_are_named(settings: dict[str, Any], code: str, said: str, llama_base: Path, tmp_path: Path) -> None:
    assert said in codes(adapter(llama_base, tmp_path / "adapter", **settings))[code]


@pytest.mark.parametrize("target", ["q_proj", "lm_head", "embed_tokens"])
def test_a_note_is_there_where_an_export_refuses(target: str, tied_base: Path, tmp_path: Path) -> None:
    path = adapter(tied_base, tmp_path / "adapter", r=8, target_modules=[target])
    formats: tuple[Format, ...] = ("gguf", "mlx", "vllm")
    refused = set()
    for to in formats:
        try:
            export_adapter(path, to, None if to == "vllm" else tmp_path / f"out.{to}", str(tied_base))
        except ConfigError:
            refused.add(to)
    assert refused == (set() if target == "q_proj" else set(formats))
    assert {code.partition("-")[0] for code in codes(path)} == refused


def test_factors_of_experts_are_named_to_each_program(tmp_path: Path) -> None:
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**size, **heads))
    attach(model, LoraConfig(r=8, target_modules=[], target_parameters=["mlp.experts.down_proj"]))
    found = codes(save_adapter(model, tmp_path / "adapter"))
    assert "vLLM refuses adapters with target_parameters" in found["vllm-experts"]
    for code in ("gguf-experts", "mlx-experts"):
        assert "hold no factors of stacked experts (target_parameters)" in found[code]


def test_factors_of_experts_that_do_not_fit_the_base_are_named(tmp_path: Path) -> None:
    def mixtral(**sizes: int) -> Any:
        size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
        return transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**size | heads | sizes))

    model = mixtral()
    attach(model, LoraConfig(r=8, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]))
    path = save_adapter(model, tmp_path / "adapter")
    for name, sizes in {"same": {}, "wide": {"intermediate_size": 32}, "shallow": {"num_hidden_layers": 1}}.items():
        mixtral(**sizes).save_pretrained(tmp_path / name)
    errors = {"unmatched-module", "wrong-shape"}
    assert not errors & codes(path, tmp_path / "same").keys()
    wrong = codes(path, tmp_path / "wide")["wrong-shape"]
    assert wrong.endswith("mlp.experts.down_proj[1]' is 16 x 24 where the base has 16 x 32")
    assert "the base has no module 'model.layers.1." in codes(path, tmp_path / "shallow")["unmatched-module"]


def test_a_base_in_another_precision_is_a_note(llama_base: Path, tmp_path: Path) -> None:
    base = load_base(str(llama_base), "float32", "cpu")
    coarse = {n: p + 0.05 * p.std() * torch.randn_like(p) for n, p in base.model.named_parameters()}
    attach(base.model, LoraConfig(r=8, init_lora_weights=False))
    trained_on = Provenance(base=fingerprint(coarse, "Q4_1").as_json())
    path = save_adapter(base.model, tmp_path / "a", provenance=trained_on)
    (found,) = inspect_adapter(path, str(llama_base)).findings
    assert (found.severity, found.code) == ("note", "other-precision")
    assert "a matches this base in another precision" in found.message


def test_what_is_wrong_in_the_files_is_named(llama_base: Path, gpt2_base: Path, tmp_path: Path) -> None:
    path = adapter(llama_base, tmp_path / "adapter", r=8)
    q = "model.layers.0.self_attn.q_proj"
    key = f"base_model.model.{q}.lora"
    whole = load_file(path / FILE)
    B = whole[f"{key}_B.weight"]
    assert (
        f"'{q}' uses 3 of its 8"
        in codes(changed(path, {f"{key}_B.weight": B * (torch.arange(8) < 3)}))["rank-deficient"]
    )
    targets = ["q_proj", "q_porj"]
    assert (
        "'q_porj', but the file holds nothing" in codes(changed(path, target_modules=targets))["target-without-tensors"]
    )
    above = adapter(llama_base, tmp_path / "above", r=80, target_modules=["q_proj"])
    assert "uses 32 of its 80 directions" in codes(above)["rank-deficient"]
    whole = adapter(llama_base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert codes(whole)["whole"].endswith("no part of these figures: lm_head")
    narrow = adapter(llama_base, tmp_path / "narrow", target_modules=["q_proj"])
    said = codes(changed(narrow, target_modules=["q_proj", "k_proj"]), llama_base)["target-ignored"]
    assert "_proj' of the base, but the file holds nothing" in said
    found = codes(path, gpt2_base)
    assert "the base has no module" in found["unmatched-module"]
    wide = torch.zeros(8, 33)
    wrong = codes(changed(path, {f"{key}_A.weight": wide + 1}), llama_base)["wrong-shape"]
    assert wrong == f"'{q}' is 32 x 33 where the base has 32 x 32"
    other_rank = {f"{key}_A.weight": torch.ones(5, 32), f"{key}_B.weight": torch.randn(32, 5)}
    assert "has rank 5 in the tensors but 8 by the config" in codes(changed(path, other_rank))["rank-mismatch"]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_fits_its_base_whatever_its_groups(groups: int, tmp_path: Path) -> None:
    def net(width: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(width, 8, 3, groups=groups))

    attach(model := net(4), LoraConfig(r=4, target_modules=["0"]))
    files = open_adapter(save_adapter(model, tmp_path / "a"))
    assert [*lint_against(files, module_shapes(net(4)))] == []
    (wrong,) = lint_against(files, module_shapes(net(6)))
    assert wrong.message == "'0' is 8 x 36 where the base has 8 x 54"


# ---------------------------------------------------------------------------------------------- the command


def test_the_document_is_json_where_a_share_is_infinite(cli: WarmCli, llama_base: Path, tmp_path: Path) -> None:
    model = load_base(str(llama_base), "float32", "cpu").model
    torch.nn.init.zeros_(model.model.layers[0].self_attn.q_proj.weight)
    shutil.copytree(llama_base, tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    path = adapter(tmp_path / "base", tmp_path / "a", target_modules=["q_proj"])
    said = cli("inspect", path, "--base", tmp_path / "base", "--html", tmp_path / "a.html", "--json").stdout
    first, second = (m["beside_base"]["relative_norm"] for m in json.loads(said, parse_constant=pytest.fail)["modules"])
    assert first is None
    assert second > 0


def test_the_command_writes_pages_that_need_no_network(cli: WarmCli, llama_base: Path, tmp_path: Path) -> None:
    first, second = (adapter(llama_base, tmp_path / name, r=r) for name, r in (("a", 4), ("b", 2)))
    found = cli("inspect", first, "--base", llama_base, "--intruders", "--html", tmp_path / "a.html", "--json").json()
    assert {"relative_norm", "amplification", "intruders"} <= set(found["modules"][0]["beside_base"])
    page = Page((tmp_path / "a.html").read_text())
    assert "Amplification of its own directions" in page.text
    assert len([t for t in page.all("td") if "--heat" in (t.get("style") or "")]) == 6 * 14
    compared = cli("compare", first, second, "--html", tmp_path / "ab.html")
    assert "cosine of all updates together" in compared.stdout
    both = Page((tmp_path / "ab.html").read_text())
    assert "Settings that differ" in both.text
    assert len(both.all("h3")) == 14
    for one in (page, both):
        assert not [t for t in one.all("link") if t.get("href") != "data:,"] + one.all("script") + one.all("img")
    assert "intruders" in cli("inspect", first, "--base", llama_base).stdout
