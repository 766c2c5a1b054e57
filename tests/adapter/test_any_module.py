"""Modules that no library made: an MLP, a small ConvNet and a ViT block, through the whole life of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build_model, logits, randomise
from tiny_adapters import learned
from torch import Tensor, nn

import twofold
from twofold.adapter.attach import attach, detach, merge, trainable_summary
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, open_adapter, save_adapter
from twofold.adapter.shapes import module_shapes
from twofold.errors import ConfigError
from twofold.inspection.report import report_adapter
from twofold.merging.checkpoint import merged_state
from twofold.merging.methods import METHODS
from twofold.merging.resize import Size
from twofold.planning.parameters import plan_parameters
from twofold.recipes.resize import resize


class VitBlock(nn.Module):
    """Patches by a convolution that the block asks for its stride, attention by torch's module, a learned first token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[-1] % self.patches.stride[0] == 0
        x = self.patches(image).flatten(2).mT
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        found: Tensor = self.head(x[:, 0])
        return found


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, padding=2, dilation=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mlp": (mlp, lambda: torch.randn(6, 48), {"target_modules": "all-linear", "use_rslora": True}),
    "convnet": (convnet, lambda: torch.randn(6, 3, 8, 8), {"target_modules": ["0", "2"], "modules_to_save": ["5"]}),
    "vit": (
        VitBlock,
        lambda: torch.randn(6, 3, 8, 8),
        {"target_modules": ["patches", "attn", "mlp.0", "mlp.2"], "modules_to_save": ["head"], "bias": "lora_only"},
    ),
}


def made(case: str) -> tuple[Any, Tensor, LoraConfig]:
    make, given, settings = CASES[case]
    torch.manual_seed(0)
    return make(), given(), LoraConfig(r=4, lora_alpha=4, **settings)


@pytest.mark.parametrize("case", CASES)
def test_from_planning_to_merging(case: str, tmp_path: Path) -> None:
    model, x, config = made(case)
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    planned = plan_parameters(config, module_shapes(model), 1).trainable
    attach(model, config)
    assert trainable_summary(model).trainable == planned
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)

    labels = torch.arange(len(x)) % 5
    optimiser = torch.optim.Adam([p for _, p in learned(model)], lr=0.02)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    trained = model.eval()(x)

    save_adapter(model, tmp_path / "a")
    other, _, _ = made(case)
    load_adapter(other.eval(), tmp_path / "a")
    torch.testing.assert_close(other(x), trained, rtol=1e-5, atol=1e-6)
    report = report_adapter(open_adapter(tmp_path / "a"))
    assert [f for f in report.findings if f.severity != "note"] == []
    assert all(0 < m.spectral_norm <= m.frobenius_norm + 1e-6 for m in report.modules)

    merge(other)
    torch.testing.assert_close(other(x), trained, rtol=1e-4, atol=1e-5)
    detach(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert repr(model) == repr(made(case)[0].eval())


def test_a_vit_merged_for_good_is_a_plain_vit() -> None:
    model, x, config = made("vit")
    attach(model.eval(), config)
    randomise(learned(model))
    expected = model(x)
    plain = VitBlock().eval()
    plain.load_state_dict(merged_state(model))
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)


ENCODERS: dict[str, dict[str, Any]] = {
    "bert-classifier": {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    "t5": {"target_modules": ["q", "v", "wi", "wo"]},
}


@pytest.mark.parametrize("family", list(ENCODERS))
def test_an_encoder_with_its_head_and_an_encoder_decoder(family: str, tmp_path: Path) -> None:
    """Trained here, opened by PEFT, and merged into what transformers opens."""
    model = build_model(family)
    attach(model, LoraConfig(r=4, **ENCODERS[family]))
    optimiser = torch.optim.Adam([p for _, p in learned(model)], lr=0.05)
    losses = []
    for _ in range(6):
        found = logits(model).flatten(0, -2)
        loss = nn.functional.cross_entropy(found, torch.arange(len(found)) % 3)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    expected = logits(model)
    save_adapter(model, tmp_path / "a")
    again = build_model(family)
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), expected)
    theirs = peft.PeftModel.from_pretrained(build_model(family), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    bare = build_model(family)
    bare.load_state_dict(merged_state(model))
    torch.testing.assert_close(logits(bare), expected, rtol=1e-4, atol=1e-4)


def saved_at_random(case: str, path: Path) -> tuple[Any, Tensor, Path]:
    model, x, config = made(case)
    attach(model, config)
    randomise(learned(model))
    return model.eval(), x, save_adapter(model, path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["mlp", "vit"])
def test_combined_alone_it_stays_what_it_is(case: str, method: str, tmp_path: Path) -> None:
    model, x, path = saved_at_random(case, tmp_path / "a")
    twofold.combine({path: 1.0}, tmp_path / "same", method=method)
    other, _, _ = made(case)
    load_adapter(other.eval(), tmp_path / "same")
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)


def test_groups_are_no_one_product(tmp_path: Path) -> None:
    _, _, path = saved_at_random("convnet", tmp_path / "a")
    with pytest.raises(ConfigError, match="'2' is a convolution with groups"):
        twofold.combine({path: 1.0}, tmp_path / "same")
    with pytest.raises(ConfigError, match="'2' is a convolution with groups"):
        resize(path, tmp_path / "same", Size(r=2))
