"""Advice: quiet about what works, loud about what is an order of magnitude off, and never without a source."""

from __future__ import annotations

import pytest

from twofold.adapter.config import LoraConfig
from twofold.planning.advice import far_off, good_rates, rank_advice, target_advice


@pytest.mark.parametrize(
    ("rate", "config", "hidden"),
    [
        (2e-3, LoraConfig(r=16, lora_alpha=32), 576),  # this project's demo
        (2e-4, LoraConfig(r=16, lora_alpha=32), 576),
        (2e-4, LoraConfig(r=16, lora_alpha=32), 4096),
        (1e-4, LoraConfig(r=8, lora_alpha=16), 8192),
        (2e-4, LoraConfig(r=4, lora_alpha=32), 1024),  # GPT-2 in arXiv 2106.09685
        (2e-4, LoraConfig(r=256, lora_alpha=512), 4096),  # arXiv 2405.09673
        (2e-4, LoraConfig(r=64, lora_alpha=16), 8192),  # QLoRA, arXiv 2305.14314
        (5e-4, LoraConfig(r=512, lora_alpha=32), 2048),  # LoRA Without Regret
    ],
)
def test_published_settings_pass(rate: float, config: LoraConfig, hidden: int) -> None:
    assert far_off(rate, config, hidden) == []


def test_the_rates_are_tinkers() -> None:
    assert good_rates(2000) == pytest.approx((5e-4, 5e-4))
    assert good_rates(4096)[0] == pytest.approx(5e-4 * (2000 / 4096) ** 0.781)
    assert good_rates(512)[1] == pytest.approx(5e-4 * (2000 / 512) ** 0.781)


def test_a_rate_for_full_fine_tuning_is_too_low_and_one_far_above_too_high() -> None:
    (low,) = far_off(5e-6, LoraConfig(), 4096)
    assert "times below" in low
    assert "Schulman 2025" in low
    (high,) = far_off(0.1, LoraConfig(), 4096)
    assert "times above" in high


def test_alpha_and_rate_are_one() -> None:
    assert far_off(1e-3, LoraConfig(r=16, lora_alpha=32), 4096) == []
    assert "learning_rate 0.001" in far_off(1e-3, LoraConfig(r=512, lora_alpha=512), 4096)[0]
    assert far_off(1e-3 / 16, LoraConfig(r=512, lora_alpha=512), 4096) == []


def test_a_small_scale_at_a_large_rank_points_to_rslora() -> None:
    (said,) = far_off(2e-4, LoraConfig(r=256, lora_alpha=16), 4096)
    assert "2312.03732" in said
    assert far_off(2e-4, LoraConfig(r=256, lora_alpha=16, use_rslora=True), 4096) == []


def test_a_huge_scale_is_named() -> None:
    assert "2405.09673" in far_off(1e-4, LoraConfig(r=2, lora_alpha=64), 576)[0]


def test_attention_only_is_worth_a_word() -> None:
    assert target_advice(False) == []
    assert "all-linear" in target_advice(True)[0]


def test_a_large_rank_is_worth_a_word_in_a_plan_and_none_in_a_run() -> None:
    assert rank_advice(LoraConfig(r=16)) == []
    assert "twofold resize --tolerance" in rank_advice(LoraConfig(r=128))[0]
    assert far_off(1e-3, LoraConfig(r=128, lora_alpha=128), 4096) == []
