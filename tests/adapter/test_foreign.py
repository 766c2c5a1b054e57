"""Files of kohya's scripts and of diffusers, on handmade modules, against the formula written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from twofold.adapter.attach import adapter_layers, attached
from twofold.adapter.files import load_adapter, save_adapter
from twofold.errors import AdapterFileError


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 6)
        self.to_out = nn.ModuleList([nn.Linear(6, 6), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.to_out[0](torch.tanh(self.to_q(x)))
        return found


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3)
        self.proj_in = nn.Conv2d(6, 6, 1)
        self.down_blocks = nn.ModuleList([Attention()])

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.down_blocks[0](self.proj_in(self.conv_in(image)).flatten(2).mT)
        return found


class Pipeline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text_encoder = Unet(), nn.ModuleDict({"fc_1": nn.Linear(4, 4)})


MAPS = {
    "conv_in": (3, 6, 3),
    "proj_in": (6, 6, 1),
    "down_blocks.0.to_q": (6, 6, 0),
    "down_blocks.0.to_out.0": (6, 6, 0),
}
ALPHAS = {"conv_in": 2.0, "down_blocks.0.to_q": 5.0}


def unet() -> Any:
    torch.manual_seed(0)
    return Unet()


def factors() -> dict[str, tuple[Tensor, Tensor]]:
    """By module, A and B with ranks of their own; convolutions as kernels."""
    torch.manual_seed(1)
    found = {}
    for r, (name, (i, o, k)) in enumerate(MAPS.items(), 1):
        found[name] = torch.randn(r, i, *(k, k) * bool(k)), torch.randn(o, r, *(1, 1) * bool(k))
    return found


def by_hand(scales: dict[str, float] | None = None) -> Tensor:
    """The output of a network whose weights are W + scale · B A; the scale is alpha / r if not given."""
    model = unet()
    with torch.no_grad():
        for name, (A, B) in factors().items():
            scale = ALPHAS.get(name, float(len(A))) / len(A) if scales is None else scales[name]
            delta = B.flatten(1) @ A.flatten(1) * scale
            weight = model.get_submodule(name).weight
            weight += delta.view(weight.shape)
    return model(image())


def image() -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 25).view(2, 3, 5, 5)


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def processor(name: str) -> str:
    return "unet." + name.replace(".to_q", ".processor.to_q_lora").replace(".to_out.0", ".processor.to_out_lora")


LAYOUTS: dict[str, tuple[Any, str, str]] = {
    "kohya": (kohya, "lora_down.weight", "lora_up.weight"),
    "diffusers": (lambda n: f"unet.{n}", "lora_A.weight", "lora_B.weight"),
    "diffusers without a prefix": (lambda n: n, "lora_A.weight", "lora_B.weight"),
    "diffusers, older": (lambda n: f"unet.{n}", "lora.down.weight", "lora.up.weight"),
    "diffusers, oldest": (processor, "down.weight", "up.weight"),
}


def tensors(layout: str) -> dict[str, Tensor]:
    """The file's tensors; an alpha that is not there means r in kohya's files alone, so the others have them all."""
    name_of, down, up = LAYOUTS[layout]
    found = {}
    for name, (A, B) in factors().items():
        inner = name_of(name)
        ends = (
            (down, up) if inner.endswith("_lora") or layout != "diffusers, oldest" else (f"lora.{down}", f"lora.{up}")
        )
        found |= {f"{inner}.{ends[0]}": A, f"{inner}.{ends[1]}": B}
        if name in ALPHAS or layout != "kohya":
            found[f"{inner}.alpha"] = torch.tensor(ALPHAS.get(name, float(len(A))))
    return found


def without_alphas(layout: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors(layout).items() if not key.endswith(".alpha")}


def written(path: Path, found: dict[str, Tensor], told: dict[str, Any] | None = None) -> Path:
    """A file of these tensors, and of what diffusers tells in its header."""
    metadata = None if told is None else {"format": "pt", "lora_adapter_metadata": json.dumps(told)}
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, path, metadata)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_outputs_are_those_of_the_formula(layout: str, tmp_path: Path) -> None:
    model = unet()
    bare = model(image())
    load_adapter(model, written(tmp_path / "lora.safetensors", tensors(layout)), "style")
    assert attached(model) == ["style"]
    torch.testing.assert_close(model(image()), by_hand(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(image()), bare, atol=1e-2)
    save_adapter(model, tmp_path / "a", "style")
    again = unet()
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(image()), model(image()))


def test_a_whole_pipeline_is_told_apart_by_its_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pipeline()
    A, B = torch.randn(2, 4), torch.randn(4, 2)
    text = {"lora_te_fc_1.lora_down.weight": A, "lora_te_fc_1.lora_up.weight": B}
    x = torch.randn(3, 4)
    expected = F.linear(x, model.text_encoder["fc_1"].weight + B @ A, model.text_encoder["fc_1"].bias)  # type: ignore[arg-type,operator]
    load_adapter(model, written(tmp_path / "lora.safetensors", tensors("kohya") | text))
    torch.testing.assert_close(model.text_encoder["fc_1"](x), expected)
    assert {n for n, _ in adapter_layers(model)} == {f"unet.{n}" for n in MAPS} | {"text_encoder.fc_1"}


def test_factors_of_linear_maps_and_pointwise_convolutions_are_the_same(tmp_path: Path) -> None:
    found = tensors("kohya")
    for end in ("lora_down.weight", "lora_up.weight"):
        found[f"{kohya('proj_in')}.{end}"] = found[f"{kohya('proj_in')}.{end}"].flatten(1)
        found[f"{kohya('down_blocks.0.to_q')}.{end}"] = found[f"{kohya('down_blocks.0.to_q')}.{end}"][..., None, None]
    model = unet()
    load_adapter(model, written(tmp_path / "lora.safetensors", found))
    torch.testing.assert_close(model(image()), by_hand(), rtol=1e-4, atol=1e-4)


def test_everything_wrong_is_in_one_message_and_the_model_stays_bare(tmp_path: Path) -> None:
    found = tensors("kohya")
    found |= {f"lora_unet_conv_inn.{e}": torch.ones(1, 1) for e in ("lora_down.weight", "lora_up.weight")}
    found["lora_unet_proj_in.scalar"] = torch.ones(6)
    del found["lora_unet_conv_in.lora_up.weight"]
    model = unet()
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(model, written(tmp_path / "lora.safetensors", found))
    for part in (
        "no module for 'lora_unet_conv_inn' (nearest: 'conv_in')",
        "unexpected tensor 'lora_unet_proj_in.scalar'",
        "'lora_unet_conv_in' has no B",
    ):
        assert part in str(caught.value)
    assert not list(adapter_layers(model))
    wrong = tensors("kohya") | {"lora_unet_conv_in.lora_down.weight": torch.ones(1, 3, 5, 5)}
    with pytest.raises(AdapterFileError, match=r"has shape \(1, 3, 5, 5\) where this model needs \(1, 3, 3, 3\)"):
        load_adapter(model, written(tmp_path / "lora.safetensors", wrong))
    assert not list(adapter_layers(model))


def test_a_name_that_may_be_two_modules_is_not_guessed(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(2, 2)}), "a": nn.ModuleDict({"b_c": nn.Linear(2, 2)})})
    found = {"lora_unet_a_b_c.lora_down.weight": torch.ones(1, 2), "lora_unet_a_b_c.lora_up.weight": torch.ones(2, 1)}
    with pytest.raises(AdapterFileError, match=r"'lora_unet_a_b_c' may be 'a\.b_c' or 'a_b\.c'"):
        load_adapter(model, written(tmp_path / "lora.safetensors", found))


RANKS = {"^proj_in": 2, "^down_blocks.0.to_q": 3, r".*to_out\.0": 4}
TOLD: list[tuple[dict[str, Any], dict[str, float]]] = [
    ({"lora_alpha": 6}, {"conv_in": 6, "proj_in": 6 / 2, "down_blocks.0.to_q": 6 / 3, "down_blocks.0.to_out.0": 6 / 4}),
    (
        {"lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"to_q": 5, "conv_in": 2}},
        {"conv_in": 2, "proj_in": 6 / 2**0.5, "down_blocks.0.to_q": 5 / 3**0.5, "down_blocks.0.to_out.0": 6 / 2},
    ),
]


@pytest.mark.parametrize(("settings", "scales"), TOLD, ids=["alpha", "patterns and rslora"])
@pytest.mark.parametrize("part", ["unet", ""], ids=["pipeline", "one part"])
def test_diffusers_header_gives_the_scales(
    part: str, settings: dict[str, Any], scales: dict[str, float], tmp_path: Path
) -> None:
    prefix = f"{part}." if part else ""
    told = {"r": 1, "rank_pattern": RANKS, "peft_type": "LORA", "init_lora_weights": "gaussian", **settings}
    found = without_alphas("diffusers" if part else "diffusers without a prefix")
    (tmp_path / "saved").mkdir()
    file = tmp_path / "saved" / "pytorch_lora_weights.safetensors"
    written(file, found, {prefix + key: value for key, value in told.items()})
    model = unet()
    load_adapter(model, tmp_path / "saved")
    torch.testing.assert_close(model(image()), by_hand(scales), rtol=1e-4, atol=1e-4)


def test_a_pipeline_as_diffusers_writes_it(tmp_path: Path) -> None:
    """Keys and header as `StableDiffusionLoraLoaderMixin.save_lora_weights` of diffusers 0.42.1 wrote them of two PEFT adapters."""
    endings = {"A": "lora_A.weight", "B": "lora_B.weight"}, {"A": "lora.down.weight", "B": "lora.up.weight"}
    found = {
        f"unet.{name}.{endings[name.startswith('down_blocks')][role]}": tensor
        for name, pair in factors().items()
        for role, tensor in zip("AB", pair, strict=True)
    }
    A, B = torch.randn(2, 4), torch.randn(4, 2)
    found |= {"text_encoder.fc_1.lora_linear_layer.down.weight": A, "text_encoder.fc_1.lora_linear_layer.up.weight": B}
    empty = {"loftq_config": {}, "megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "0.21.2"}
    empty |= {
        "base_model_name_or_path": "",
        "peft_type": "LORA",
        "eva_config": None,
        "use_qalora": False,
        "bias": "none",
    }
    of_unet = {"r": 1, "rank_pattern": RANKS, "lora_alpha": 6, "init_lora_weights": "gaussian", **empty}
    of_text = {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["fc_1"], **empty}
    told = {f"unet.{k}": v for k, v in of_unet.items()} | {f"text_encoder.{k}": v for k, v in of_text.items()}
    torch.manual_seed(0)
    model: Any = Pipeline()
    weight, bias = model.text_encoder["fc_1"].weight, model.text_encoder["fc_1"].bias
    model.unet = unet()
    load_adapter(model, written(tmp_path / "a.safetensors", found, told))
    torch.testing.assert_close(model.unet(image()), by_hand(TOLD[0][1]), rtol=1e-4, atol=1e-4)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model.text_encoder["fc_1"](x), F.linear(x, weight + 5 / 2**0.5 * B @ A, bias))


def test_scales_that_cannot_be_known_are_refused(tmp_path: Path) -> None:
    def refused(found: dict[str, Tensor], told: dict[str, Any] | None, match: str) -> None:
        with pytest.raises(AdapterFileError, match=match):
            load_adapter(unet(), written(tmp_path / "a.safetensors", found, told))

    silent, all_told = without_alphas("diffusers"), {"unet.r": 1, "unet.rank_pattern": RANKS, "unet.lora_alpha": 6}
    refused(
        silent | {"unet.conv_in.alpha": torch.tensor(1.0)},
        None,
        "some modules but not for 'unet.down_blocks.0.to_out.0'",
    )
    refused(tensors("diffusers"), all_told, "says its scales twice")
    refused(silent, all_told | {"unet.rank_pattern": {}}, "has rank 4 in the tensors but 1 by the header")
    refused(silent, {f"text_encoder.{k[5:]}": v for k, v in all_told.items()}, "says nothing of 'unet'")
    refused(silent, all_told | {"unet.use_qalora": True}, "does not support: use_qalora=True")
    refused(silent, all_told | {"unet.init_lora_weights": "pissa"}, "its start changed the base")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_says_nothing_means_scale_one(layout: str, tmp_path: Path) -> None:
    """What kohya's scripts and diffusers do with it, of one rank or of several."""
    model = unet()
    load_adapter(model, written(tmp_path / "a.safetensors", without_alphas(layout)))
    torch.testing.assert_close(model(image()), by_hand(dict.fromkeys(MAPS, 1.0)), rtol=1e-4, atol=1e-4)


def test_locon_with_a_convolution_between_is_the_product_of_the_three(tmp_path: Path) -> None:
    down, mid, up = torch.randn(2, 3, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(6, 2, 1, 1)
    found = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(3.0)}
    model, bare = unet(), unet()
    load_adapter(model, written(tmp_path / "a.safetensors", {f"lora_unet_conv_in.{k}": v for k, v in found.items()}))
    added = F.conv2d(F.conv2d(F.conv2d(image(), down), mid), up) * 3 / 2
    torch.testing.assert_close(model.conv_in(image()), bare.conv_in(image()) + added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ending", ["dora_scale", "lora_magnitude_vector"])
def test_dora_of_linear_maps_is_that_of_the_formula(ending: str, tmp_path: Path) -> None:
    A, B, lengths = torch.randn(2, 6), torch.randn(6, 2), torch.rand(6) + 0.5
    name, down, up = (
        ("lora_unet_down_blocks_0_to_q", "lora_down.weight", "lora_up.weight")
        if ending == "dora_scale"
        else ("unet.down_blocks.0.to_q", "lora_A.weight", "lora_B.weight")
    )
    stored = lengths[:, None] if ending == "dora_scale" else lengths
    model, bare = unet(), unet()
    load_adapter(
        model,
        written(tmp_path / "a.safetensors", {f"{name}.{down}": A, f"{name}.{up}": B, f"{name}.{ending}": stored}),
    )
    weight = bare.down_blocks[0].to_q.weight + B @ A
    x = torch.randn(4, 6)
    expected = F.linear(x, lengths[:, None] * weight / weight.norm(dim=1, keepdim=True), bare.down_blocks[0].to_q.bias)
    torch.testing.assert_close(model.down_blocks[0].to_q(x), expected, rtol=1e-4, atol=1e-4)
    half = tensors("kohya") | {"lora_unet_down_blocks_0_to_q.dora_scale": lengths[:, None]}
    with pytest.raises(AdapterFileError, match=r"to_q\.dora_scale' but no such tensor for 'lora_unet_conv_in'"):
        load_adapter(unet(), written(tmp_path / "b.safetensors", half))


def test_other_kinds_of_files_are_told_in_a_sentence(tmp_path: Path) -> None:
    loha = {f"lora_unet_conv_in.hada_w{i}_{ab}": torch.ones(2, 2) for i in (1, 2) for ab in "ab"}
    with pytest.raises(AdapterFileError, match=r"'lora_unet_conv_in\.hada_w1_a' is LoHa, which is no LoRA"):
        load_adapter(unet(), written(tmp_path / "a.safetensors", tensors("kohya") | loha))
    peft = {"base_model.model.conv_in.lora_A.weight": torch.ones(1)}
    with pytest.raises(AdapterFileError, match=r"in the adapter_config\.json beside them; give the folder of both"):
        load_adapter(unet(), written(tmp_path / "b.safetensors", peft))
    text = {"lora_te_fc_1.lora_down.weight": torch.ones(2, 4), "lora_te_fc_1.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(AdapterFileError, match=r"for the parts lora_te, lora_unet of a pipeline.*nn\.ModuleDict"):
        load_adapter(unet(), written(tmp_path / "c.safetensors", tensors("kohya") | text))
    with pytest.raises(AdapterFileError, match="holds no adapter that is known here"):
        load_adapter(unet(), written(tmp_path / "d.safetensors", {"weight": torch.ones(1)}))


def test_the_level_that_clips_text_encoders_had_before_is_passed_over(tmp_path: Path) -> None:
    model = nn.ModuleDict({"text_encoder": nn.ModuleDict({"encoder": nn.ModuleDict({"fc1": nn.Linear(4, 4)})})})
    name = "lora_te_text_model_encoder_fc1"
    found = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
    load_adapter(model, written(tmp_path / "a.safetensors", found))
    assert [n for n, _ in adapter_layers(model)] == ["text_encoder.encoder.fc1"]
