"""What rates and ranks to begin with, and settings far from known-good ones, each said with its source.

`far_off`, which runs warn with, is quiet unless something is about tenfold off.
"""

from __future__ import annotations

from twofold.adapter.config import LoraConfig, Resolved, resolve

FAR = 10.0
"""How many times off a setting must be."""
EXPONENTS = (0.0775, 0.781)
"""Of the width, in Tinker's formula: for Qwen and for Llama models."""
COMMON_ALPHA = 32
"""The alpha that the formula's rates hold for."""
LARGE_RANK = 64
FORMULA = "Tinker's formula 5e-4 · (2000 / width)^p"


def good_rates(hidden: int) -> tuple[float, float]:
    """Rates that work for a model of this width at lora_alpha 32: 5e-5 · 10 · (2000 / width)^p."""
    found = sorted(5e-5 * 10 * (2000 / hidden) ** p for p in EXPONENTS)
    return found[0], found[1]


def rate_to_begin_with(hidden: int) -> str:
    """For who names none: the default is one for all widths."""
    low, high = good_rates(hidden)
    return (
        f"begin with a learning_rate of {low:.1g} to {high:.1g} at lora_alpha {COMMON_ALPHA}, whatever the rank ({FORMULA}; "
        "SmolLM2 did best at 3e-3 at every rank: docs/evidence, rate-by-rank); twofold sweep or train --find-lr tries rates on "
        "your own data"
    )


def rank_advice(config: LoraConfig) -> list[str]:
    """Is the rank one that short runs have no use for? Worth saying in a plan, too common to warn about in a run."""
    if config.r < LARGE_RANK:
        return []
    return [
        f"rank {config.r} costs {config.r} times what rank 1 does, which did as well in a dozen steps (docs/evidence, "
        "matches-full; ranks matter when an adapter is full: Schulman 2025, LoRA Without Regret); twofold resize --tolerance "
        "finds after a run which smaller one would have done"
    ]


def rate_advice(rate: float, config: LoraConfig, hidden: int) -> list[str]:
    """Is the learning rate, together with alpha, far from the rates that are known to work?

    With delta = scale · B A, doubling the scale is for B what doubling its rate is, so the two are judged as one:
    rate · scale · r / 32, in which scale · r is lora_alpha, or lora_alpha · sqrt(r) under rsLoRA. With Adam that overstates alpha:
    on SmolLM2 the best rate went as alpha to the power -0.5 (docs/evidence, alpha-by-rate), no tenfold within usual alphas.
    """
    low, high = good_rates(hidden)
    found = resolve(config, "")
    effective = rate * found.scale * found.r / COMMON_ALPHA
    if low / FAR <= effective <= high * FAR:
        return []
    times, where = (effective / high, "above") if effective > high else (low / effective, "below")
    return [
        f"learning_rate {rate:g} with lora_alpha {config.lora_alpha:g} acts like {effective:.1g} at lora_alpha {COMMON_ALPHA}, "
        f"{times:,.0f} times {where} the {low:.1g} to {high:.1g} that work at width {hidden} ({FORMULA}; LoRA "
        "wants about 10 times the rate of full fine-tuning: Schulman 2025, LoRA Without Regret; SmolLM2 did best at 3e-3: "
        "docs/evidence, rate-by-rank); twofold sweep tries rates on your own data"
    ]


def scale_advice(config: LoraConfig) -> list[str]:
    """Is alpha far from twice the rank?"""
    found: Resolved = resolve(config, "")
    ratio = found.alpha / found.r
    small = found.alpha < COMMON_ALPHA and ratio < 2 / FAR
    if small and found.r >= LARGE_RANK and not config.use_rslora:
        return [
            f"lora_alpha / r is {ratio:.2g}: scaled so, rank {found.r} learns hardly more than a small one; alpha / sqrt(r) keeps "
            "the update's size (use_rslora; rsLoRA, arXiv 2312.03732), or take alpha = 2 r (arXiv 2405.09673)"
        ]
    if found.scale > 2 * FAR:
        return [
            f"each update is scaled by {found.scale:.3g}, over {FAR:g} times the alpha / r = 2 that did best in arXiv 2405.09673; "
            "lower lora_alpha, or the learning rate with it"
        ]
    return []


def target_advice(attention_only: bool) -> list[str]:
    """Are the MLPs left out? Worth saying in a plan, too common to warn about in a run."""
    if not attention_only:
        return []
    return [
        "only attention is adapted: at the same number of parameters that did worse than adapting the MLPs, and all-linear "
        "did best (Schulman 2025, LoRA Without Regret; arXiv 2405.09673; by 23 % on SmolLM2: docs/evidence, targets)"
    ]


def far_off(rate: float, config: LoraConfig, hidden: int) -> list[str]:
    """What a run should be warned about before it starts."""
    return [*rate_advice(rate, config, hidden), *scale_advice(config)]
