"""Bases that bitsandbytes packed, ours beside PEFT's over them: the same codes, factors and logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import randomise
from test_quantised import IDS, logits, packed
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from twofold.adapter.attach import activate, attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, save_adapter
from twofold.adapter.rows import rows
from twofold.errors import ConfigError
from twofold.quant import Scheme
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import train

pytest_plugins = ("tiny_fixtures",)


def of_bitsandbytes(folder: Path, bits: int) -> Any:
    """A model that a user packed with transformers' own settings. In training mode, for at a CPU's first pass in evaluation mode
    bitsandbytes shuffles the codes."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(**(nf4 if bits == 4 else {"load_in_8bit": True}))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32).train()


def test_an_adapter_trained_on_nf4_says_the_same_in_peft_over_bitsandbytes(
    config: TrainConfig, wide_base: Path
) -> None:
    """PEFT with transformers' own 4-bit loading is the oracle: same codes, same factors, same logits."""
    from peft import PeftModel

    report = train(replace(config, base=str(wide_base), quantization="nf4"))
    ours = packed(wide_base, Scheme("nf4")).model
    load_adapter(ours, report["adapter"])
    theirs = PeftModel.from_pretrained(of_bitsandbytes(wide_base, 4), report["adapter"]).train()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-4), (8, 0.1)])
def test_bitsandbytes_own_modules_take_adapters(bits: int, tolerance: float, wide_base: Path, tmp_path: Path) -> None:
    """Its 8-bit forward also rounds the inputs, which the adapted one does not."""
    model = of_bitsandbytes(wide_base, bits)
    before = logits(model)
    summary = attach(model, LoraConfig(r=4))
    assert summary.modules == 14
    torch.testing.assert_close(logits(model), before, rtol=0, atol=tolerance * before.abs().max().item())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path / "adapter")
    detach(model)
    assert torch.equal(logits(model), before)


def test_codes_that_bitsandbytes_shuffled_are_refused(wide_base: Path) -> None:
    model = of_bitsandbytes(wide_base, 4).eval()
    logits(model)
    if not any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters()):
        pytest.skip("this CPU's bitsandbytes leaves codes as they are")
    with pytest.raises(ConfigError, match="repacked"):
        attach(model, LoraConfig(r=4))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_mixed_batch_over_bitsandbytes_modules_never_runs_their_own_forward(bits: int, wide_base: Path) -> None:
    """Which would shuffle four-bit codes, or round the inputs of eight-bit ones."""
    model = of_bitsandbytes(wide_base, bits).train(False)
    for name in ("a", "b"):
        attach(model, LoraConfig(r=4), name)
    randomise([(n, p) for n, p in model.named_parameters() if ".shares." in n], scale=0.1)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    with torch.no_grad():
        for _ in range(2):
            with rows(model, ["a", None, "b"]):
                together = model(input_ids=ids).logits
        for i, name in enumerate(("a", None, "b")):
            activate(model, name)
            torch.testing.assert_close(together[i], model(input_ids=ids[i : i + 1]).logits[0], rtol=1e-4, atol=1e-4)
