"""Adapters in kohya's layout: read back onto the model by the reader of such files, and against the layout written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_model, logits, randomise
from safetensors.torch import load_file
from tiny_adapters import learned
from torch import Tensor, nn

from twofold.adapter.attach import adapter_layers, attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, save_adapter
from twofold.errors import ConfigError, ProofError
from twofold.merging.export import kohya
from twofold.merging.export.kohya import kohya_name
from twofold.recipes.export import export_adapter

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "silent modules": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"[qkvo]_proj": 0}},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {"k_proj": 3, "o_proj": 7}, "alpha_pattern": {"q_proj": 5}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_file_loads_and_says_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    model = build_model("qwen3")
    attach(model, LoraConfig(**settings))
    randomise(learned(model))
    save_adapter(model, tmp_path / "adapter")
    told = export_adapter(tmp_path / "adapter", "kohya", tmp_path / "out.safetensors")
    held = load_file(tmp_path / "out.safetensors")
    assert len(held) == 3 * told["modules"]
    for module, layer in adapter_layers(model):  # kohya: W + alpha / r * up @ down
        name = f"lora_te_{module.replace('.', '_')}"
        down, up = held[f"{name}.lora_down.weight"], held[f"{name}.lora_up.weight"]
        torch.testing.assert_close(held[f"{name}.alpha"] / len(down) * up @ down, layer.delta(), rtol=1e-5, atol=1e-7)
    fresh = build_model("qwen3")
    load_adapter(fresh, tmp_path / "out.safetensors")
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spoiled", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_a_spoiled_file_is_not_proved(spoiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("qwen3")
    attach(model, LoraConfig(**SETTINGS["plain"]))
    randomise(learned(model))
    save_adapter(model, tmp_path / "adapter")
    write = kohya.write_tensors

    def write_tensors(path: Path, tensors: dict[str, Tensor], said: dict[str, str]) -> None:
        last = [key for key in tensors if key.endswith(spoiled)][-1]
        write(path, {**tensors, last: tensors[last] * 1.001}, said)

    monkeypatch.setattr(kohya, "write_tensors", write_tensors)
    with pytest.raises(ProofError, match="read back, is not the adapter's"):
        export_adapter(tmp_path / "adapter", "kohya", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


class Pipeline(nn.Module):
    """The parts that image pipelines have, as small as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.ModuleDict({"down_blocks": nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 8)})])})
        self.unet["conv_in"] = nn.Conv2d(4, 8, 3)
        self.text_encoder = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})})


def test_parts_of_a_pipeline_and_convolutions(tmp_path: Path) -> None:
    model = Pipeline()
    attach(model, LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv_in", "layers.0"]))
    randomise(learned(model))
    save_adapter(model, tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", "kohya", tmp_path / "out.safetensors")
    held = load_file(tmp_path / "out.safetensors")
    assert held["lora_unet_conv_in.lora_down.weight"].shape == (2, 4, 3, 3)
    assert {k.partition(".")[0] for k in held} == {
        "lora_unet_conv_in",
        "lora_unet_down_blocks_0_to_q",
        "lora_te_text_model_encoder_layers_0",
    }
    fresh = Pipeline()
    load_adapter(fresh, tmp_path / "out.safetensors")
    ours, found = (dict(adapter_layers(m)) for m in (model, fresh))
    assert all(torch.allclose(ours[n].delta(), found[n].delta(), rtol=1e-6) for n in ours)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("down_blocks.0.attentions.1.to_q", "lora_unet_down_blocks_0_attentions_1_to_q"),
        ("transformer.transformer_blocks.0.attn.to_q", "lora_unet_transformer_blocks_0_attn_to_q"),
        ("text_encoder_2.encoder.layers.3.mlp.fc1", "lora_te2_text_model_encoder_layers_3_mlp_fc1"),
        ("model.layers.1.self_attn.q_proj", "lora_te_model_layers_1_self_attn_q_proj"),
        ("transformer.h.0.attn.c_attn", "lora_te_transformer_h_0_attn_c_attn"),
    ],
)
def test_names(module: str, name: str) -> None:
    assert kohya_name(module) == name


def test_what_it_has_no_form_for_is_refused(tmp_path: Path) -> None:
    for i, (settings, what) in enumerate(
        [({"use_dora": True}, "lora_magnitude_vector"), ({"modules_to_save": ["lm_head"]}, "weight")]
    ):
        model = build_model("llama")
        attach(model, LoraConfig(r=2, target_modules=["q_proj"], **settings))
        save_adapter(model, tmp_path / f"{i}")
        with pytest.raises(ConfigError, match=rf"has {what}.*merge it into its base"):
            export_adapter(tmp_path / f"{i}", "kohya", tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match="'head' is in no part of a pipeline"):
        kohya_name("head")
    with pytest.raises(ConfigError, match=r"should be a file that ends in \.safetensors"):
        export_adapter(tmp_path / "0", "kohya", tmp_path / "out.bin")
