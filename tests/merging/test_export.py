"""Adapters for other programs: against formulas of those programs written out here, and against llama.cpp's own converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import GROUPED, build_model, randomise
from safetensors.torch import load_file, save_file
from tiny_adapters import learned
from warm_cli import WarmCli

from twofold import atomic
from twofold.adapter.attach import adapter_layers, attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.errors import AdapterFileError, ConfigError, ProofError, RunError, UserError
from twofold.events import Event, Warned
from twofold.lowrank.factors import LowRank
from twofold.merging.export import gguf_adapter, mlx
from twofold.merging.export.factors import prove
from twofold.recipes.export import Format, export_adapter

pytest_plugins = ("tiny_fixtures",)
LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "silent modules": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"[qkvo]_proj": 0}},
    "silent": {"r": 4, "lora_alpha": 0},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {"k_proj": 3, "o_proj": 7}, "alpha_pattern": {"q_proj": 5}},
}


def adapted(tmp_path: Path, family: str = "llama", **settings: Any) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base's folder, an adapter's, and the update of every module."""
    model = build_model(family)
    model.save_pretrained(tmp_path / "base")
    attach(model, LoraConfig(**settings))
    randomise(learned(model))
    save_adapter(model, tmp_path / "adapter")
    deltas = {name: layer.delta() for name, layer in adapter_layers(model)} if settings.get("use_dora") is None else {}
    return tmp_path / "base", tmp_path / "adapter", deltas


def in_llama_cpp(path: Path) -> dict[str, np.ndarray]:
    """The updates that llama.cpp would add, by its names: `alpha / rank * B A`, and B A if alpha is 0."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    held = {t.name: t.data.astype(np.float64) for t in reader.tensors}
    names = {n.removesuffix(".lora_a") for n in held if n.endswith(".lora_a")}
    assert len(held) == 2 * len(names)
    return {n: (alpha / len(held[f"{n}.lora_a"]) or 1.0) * held[f"{n}.lora_b"] @ held[f"{n}.lora_a"] for n in names}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"} | {
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    ("family", "turned"), [("llama", True), ("smollm3", True), ("qwen3", False), ("gemma2", False), ("gemma3", False)]
)
def test_llama_cpp_gets_the_true_updates(family: str, turned: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    base, adapter, deltas = adapted(tmp_path, family, **settings)
    told = export_adapter(adapter, "gguf", tmp_path / "out.gguf", str(base))
    found = in_llama_cpp(tmp_path / "out.gguf")
    assert len(found) == len(deltas) == told["modules"]
    for module, delta in deltas.items():
        layer, inner = module.removeprefix("model.layers.").split(".", 1)
        expected = delta.detach().double().numpy()
        heads = {"self_attn.q_proj": GROUPED["num_attention_heads"], "self_attn.k_proj": GROUPED["num_key_value_heads"]}
        if turned and inner in heads:
            expected = permuted(expected, heads[inner])
        np.testing.assert_allclose(found[f"blk.{layer}.{NAMES[inner]}.weight"], expected, rtol=1e-4, atol=1e-6)
    assert (told["largest_difference"] == 0) == ("rank_pattern" not in settings)
    assert "ADAPTER ./out.gguf" in (tmp_path / "out.Modelfile").read_text()
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["general.architecture"].contents() == family


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("to", ["gguf", "mlx", "vllm"])
def test_factors_that_are_no_numbers_are_refused(to: Format, factor: str, tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, **SETTINGS["plain"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    last = max(key for key in tensors if factor in key)
    tensors[last][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=rf"holds NaN or infinity in {factor}\.weight"):
        export_adapter(adapter, to, None if to == "vllm" else tmp_path / "out.gguf", str(base))


@pytest.mark.parametrize("poisoned", ["first", "last"])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_what_is_read_back_as_no_number_is_not_proved(factor: str, poisoned: str) -> None:
    sound = {name: LowRank(torch.ones(2, 3), torch.ones(4, 2), 1.0) for name in ("first", "last")}
    spoiled = LowRank(*(torch.ones(shape) for shape in ((2, 3), (4, 2))), 1.0)
    getattr(spoiled, factor)[0, 0] = torch.nan
    with pytest.raises(ProofError, match="differs from the adapter by nan"):
        prove(sound, {**sound, poisoned: spoiled}, "the file")


def test_a_spoiled_file_is_not_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, _ = adapted(tmp_path, **SETTINGS["plain"])
    write = gguf_adapter._write
    monkeypatch.setattr(gguf_adapter, "_write", lambda tensors, alpha, *rest: write(tensors, alpha * 1.001, *rest))
    with pytest.raises(ProofError, match=r"differs from the adapter by 0\.001"):
        export_adapter(adapter, "gguf", tmp_path / "out.gguf", str(base))
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_mlx_gets_the_true_updates(settings: dict[str, Any], tmp_path: Path) -> None:
    base, adapter, deltas = adapted(tmp_path, "qwen3", **settings)
    export_adapter(adapter, "mlx", tmp_path / "mlx", str(base))
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    held = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    assert config["lora_parameters"]["keys"] == sorted(NAMES)
    assert {t.shape[1] for k, t in held.items() if k.endswith("lora_a")} == {config["lora_parameters"]["rank"]}
    for module, delta in deltas.items():  # mlx-lm: y = W x + scale * (x lora_a) lora_b
        found = config["lora_parameters"]["scale"] * held[f"{module}.lora_a"] @ held[f"{module}.lora_b"]
        torch.testing.assert_close(found.T, delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        ("scale", r"differs from the adapter by 0\.001"),
        ("rank", r"says rank 5, but 'model\.layers\.0\..*' has 4"),
        ("lora_a", "differs from the adapter by"),
        ("lora_b", "differs from the adapter by"),
        (
            "keys",
            r"holds other modules than the adapter: model\.layers\.0\.mlp\.down_proj, model\.layers\.1\.mlp\.down_proj",
        ),
        ("num_layers", r"holds other modules than the adapter: model\.layers\.0\.mlp\.down_proj, .*model\.layers\.0\."),
    ],
)
def test_a_spoiled_folder_for_mlx_is_not_proved(
    spoiled: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = adapted(tmp_path, **SETTINGS["plain"])
    json_of, tensors_of = atomic.write_json, mlx.write_tensors

    def write_json(path: Path, config: Any) -> None:
        settings = config["lora_parameters"]
        wrong = {"scale": settings["scale"] * 1.001, "rank": settings["rank"] + 1, "keys": settings["keys"][1:]}
        layers = config["num_layers"] - (spoiled == "num_layers")
        inside = settings | {k: v for k, v in wrong.items() if k == spoiled}
        json_of(path, {**config, "num_layers": layers, "lora_parameters": inside})

    def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        last = [key for key in tensors if key.endswith(spoiled)][-1:]
        tensors_of(path, tensors | {key: tensors[key] * 1.001 for key in last})

    monkeypatch.setattr(mlx.atomic, "write_json", write_json)
    monkeypatch.setattr(mlx, "write_tensors", write_tensors)
    with pytest.raises(ProofError, match=said):
        export_adapter(adapter, "mlx", tmp_path / "out", str(base))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_and_leaves_nothing(cli: WarmCli, tmp_path: Path) -> None:
    """The limit falls among the tensors, which numpy writes without a word of what is missing."""
    base, adapter, _ = adapted(tmp_path, r=8)
    limit = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {LIMIT}"
    for size in (2_000, 9_000, 20_000):
        flags = ("--to", "gguf", "--base", base, "-o", tmp_path / "adapter.gguf")
        said = cli("export", adapter, *flags, setup=limit.format(size)).refusal()
        assert "cannot write" in said
        assert "free space or choose another" in said
        assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}


def test_nothing_gives_way_to_what_is_written_beside(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, r=2)
    (tmp_path / "out.Modelfile").write_text("mine")
    with pytest.raises(RunError, match=r"out\.Modelfile exists already"):
        export_adapter(adapter, "gguf", tmp_path / "out.gguf", str(base))
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError):
        export_adapter(adapter, "gguf", tmp_path / "new.gguf", str(base), tmp_path / "base.gguf")
    assert not (tmp_path / "new.gguf").exists()


def test_nothing_is_written_for_vllm(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path)
    with pytest.raises(ConfigError, match="leave out --output"):
        export_adapter(adapter, "vllm", tmp_path / "a.gguf", str(base))
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "rank_pattern": {"k_proj": 17}},
        {"r": 32, "rank_pattern": {".*_proj": 2}},  # vLLM compares the config's r, though no module has it
    ],
)
def test_vllm_is_told_the_smallest_rank_that_it_takes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = adapted(tmp_path, **settings)
    command = export_adapter(adapter, "vllm", None, str(base))["command"]
    assert "--max-lora-rank 32 " in command
    assert f"adapter={adapter}" in command
    monkeypatch.chdir(adapter)
    assert "--lora-modules adapter=." in export_adapter(Path("."), "vllm", None, str(base))["command"]
    assert command.startswith(f"vllm serve {base} --enable-lora")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["embed_tokens"]}, "factors of an embedding"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "whole modules"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "tokens of its own"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_the_way_out(
    settings: dict[str, Any], what: str, tmp_path: Path
) -> None:
    base, adapter, _ = adapted(tmp_path, **{"use_dora": False, **settings})
    outputs: dict[Format, Path | None] = {"gguf": tmp_path / "out.gguf", "mlx": tmp_path / "out", "vllm": None}
    for to, output in outputs.items():
        with pytest.raises(ConfigError, match=rf"has {what}.*merge it into its base"):
            export_adapter(adapter, to, output, str(base))


def test_a_head_that_is_the_embedding_and_a_foreign_base_are_refused(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, "llama-tied", target_modules=["lm_head"])
    with pytest.raises(ConfigError, match="output head is its embedding"):
        export_adapter(adapter, "gguf", tmp_path / "out.gguf", str(base))
    other = build_model("gpt2")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterFileError, match=r"no module|maps"):
        export_adapter(adapted(tmp_path / "more", "llama")[1], "gguf", tmp_path / "out.gguf", str(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no folder of llama.cpp's sources")
@pytest.mark.parametrize(
    "family", ["llama", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "mistral"]
)
def test_the_file_is_that_of_llama_cpps_own_converter(family: str, tmp_path: Path) -> None:
    """Only where its scale is right: it takes lora_alpha from the config, and knows of nothing else."""
    base, adapter, _ = adapted(tmp_path, family, **SETTINGS["plain"])
    export_adapter(adapter, "gguf", tmp_path / "ours.gguf", str(base))
    script = Path(os.environ["LLAMA_CPP"]) / "convert_lora_to_gguf.py"
    command = [sys.executable, script, adapter, "--base", base, "--outfile", tmp_path / "theirs.gguf"]
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = (gguf.GGUFReader(tmp_path / f"{who}.gguf") for who in ("ours", "theirs"))
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.fields[key].contents() == theirs.fields[key].contents()
    one, other = ({t.name: t.data for t in reader.tensors} for reader in (ours, theirs))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[k], other[k]) for k in one)


def test_pefts_copy_of_the_head_beside_its_factors_is_left_out(tmp_path: Path) -> None:
    base, path, _ = adapted(tmp_path, target_modules=["q_proj", "lm_head"])
    file = path / "adapter_model.safetensors"
    copy = build_model("llama").lm_head.weight.detach().clone()
    save_file(load_file(file) | {"base_model.model.lm_head.base_layer.weight": copy}, file)
    told: list[Event] = []
    found = export_adapter(path, "gguf", tmp_path / "a.gguf", str(base), emit=told.append)
    assert found["largest_difference"] == 0
    assert any(isinstance(e, Warned) and "a copy of the base's 'lm_head', which is left out" in e.text for e in told)
