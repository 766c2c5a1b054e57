"""The studies, as data: which trainings each is made of, and how they are read.

An arm is what a study compares, each at its own best learning rate: all its rates are tried with one seed, the best one then
runs with the others. A study that asks about the rates themselves (`every_rate`) runs all of them with every seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from twofold.base.load import Precision
from twofold.recipes.grid import spaced

Material = Literal["home-intents", "king-james", "vader"]
Reading = Literal["best", "forgetting", "rates", "cost", "spectra", "proof"]
Probe = Literal["other-texts", "answers", "spectra", "promises"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is compared.

    Attributes:
        settings: by their names as flags.
        rates: the learning rates it is tried at.
        full: full fine-tuning.
        dtype: of the base, in place of the study's, where trainings are processes of their own.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...]
    full: bool = False
    dtype: Precision | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """A claim, and the trainings that show whether it holds.

    Attributes:
        expected: what the literature says, with its source.
        material: the data, and with it the base.
        common: settings of all arms.
        every_rate: whether all rates run with every seed.
        apart: whether each training is a process of its own, so that time and memory are its own.
        over, lines: how does the best rate move with a setting? The setting, and by name the arms that differ in it.
        probes: what is measured of each model besides its held-out loss.
        folder: of its trainings; studies that read the same ones name the same, and agree in all but their arms and readings.
        hours: its budget, on 2 cores.
    """

    name: str
    claim: str
    expected: str
    arms: tuple[Arm, ...]
    reading: Reading
    material: Material = "home-intents"
    examples: int = 192
    held_out: int = 96
    seeds: int = 3
    common: Mapping[str, Any] = field(default_factory=dict)
    every_rate: bool = False
    over: str = ""
    lines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    apart: bool = False
    probes: tuple[Probe, ...] = ()
    folder: str = ""
    hours: float = 3.0


LORA_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
FULL_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RATES = tuple(spaced(3.2e-4, 1e-2, 4))
HIGHER_RATES = tuple(spaced(1e-3, 3.2e-2, 4))
"""For adapters whose scale is small."""


def _rank(r: int, **settings: Any) -> Arm:
    own = {f"adapter.{name}": value for name, value in settings.items()}
    return Arm(name=f"r = {r}", settings={"adapter.r": r, **own}, rates=LORA_RATES)


FULL = Arm(name="full", rates=FULL_RATES, full=True)

MATCHES_FULL = Study(
    name="matches-full",
    claim="LoRA matches full fine-tuning with a few per cent of the parameters or fewer",
    expected="equal or better on GLUE and E2E (arXiv 2106.09685); equal until its capacity runs out (Schulman 2025)",
    arms=(*(_rank(r) for r in (1, 8, 64)), FULL),
    reading="best",
    probes=("other-texts", "answers"),
    folder="beside-full",
)
MATCHES_FULL_VERSES = Study(
    name="matches-full-verses",
    claim="The same on a task of style",
    expected=MATCHES_FULL.expected,
    arms=(*(replace(_rank(r), rates=LORA_RATES[1:]) for r in (4, 64)), replace(FULL, rates=FULL_RATES[:3])),
    reading="best",
    material="king-james",
    examples=128,
    held_out=64,
)
MATCHES_FULL_LONGER = Study(
    name="matches-full-longer",
    claim="The same after three epochs, which is nearer to what each can hold",
    expected=MATCHES_FULL.expected,
    arms=(replace(_rank(8), rates=LORA_RATES[1:]), replace(FULL, rates=FULL_RATES[:3])),
    reading="best",
    probes=("answers",),
    common={"training.epochs": 3},
)
FORGETS_LESS = Study(
    name="forgets-less",
    claim="LoRA forgets less than full fine-tuning",
    expected="learns less and forgets less, in code and mathematics (arXiv 2405.09673)",
    arms=MATCHES_FULL.arms,
    reading="forgetting",
    probes=MATCHES_FULL.probes,
    folder=MATCHES_FULL.folder,
)
COSTS_LESS = Study(
    name="costs-less",
    claim="LoRA trains faster and in less memory than full fine-tuning, with smaller checkpoints",
    expected="25 % faster, a third of the memory, checkpoints 10,000 times smaller, for GPT-3 (arXiv 2106.09685)",
    arms=(
        Arm(name="r = 16", settings={"adapter.r": 16}, rates=(1e-3,)),
        Arm(
            name="r = 16, prefixes not shared",
            settings={"adapter.r": 16, "training.share_prefixes": False},
            rates=(1e-3,),
        ),
        Arm(name="full", rates=(3e-5,), full=True),
    ),
    reading="cost",
    examples=96,
    held_out=32,
    seeds=3,
    apart=True,
)
SCALINGS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "alpha/r": lambda r: {"adapter.lora_alpha": 32},
    "alpha/sqrt(r)": lambda r: {"adapter.lora_alpha": 8, "adapter.use_rslora": True},
    "no scale": lambda r: {"adapter.lora_alpha": 2 * r},
}
"""Three that agree at r = 16, where each multiplies by 2."""


def _scaled(name: str, r: int, settings: Mapping[str, Any], rates: tuple[float, ...] = RATES) -> Arm:
    return Arm(name=name, settings={"adapter.r": r, **settings}, rates=rates)


def _alpha(alpha: int, rates: tuple[float, ...] = RATES) -> Arm:
    return _scaled(f"r = 16, alpha = {alpha}", 16, {"adapter.lora_alpha": alpha}, rates)


RATE_BY_RANK = Study(
    name="rate-by-rank",
    claim="The best learning rate does not depend on the rank with alpha/r; it does with alpha/sqrt(r) or none",
    expected="independent of the rank under alpha/r (Schulman 2025)",
    arms=(
        *(
            _scaled(f"{name}, r = 4", 4, settings(4), RATES if name == "alpha/r" else (*RATES, HIGHER_RATES[-1]))
            for name, settings in SCALINGS.items()
        ),
        _alpha(32),
        *(
            _scaled(f"{name}, r = 64", 64, settings(64), HIGHER_RATES if name == "alpha/r" else RATES)
            for name, settings in SCALINGS.items()
        ),
    ),
    reading="rates",
    examples=128,
    held_out=64,
    every_rate=True,
    over="adapter.r",
    lines={name: (f"{name}, r = 4", _alpha(32).name, f"{name}, r = 64") for name in SCALINGS},
    folder="rates",
)
ALPHAS = (_alpha(8, (*RATES, HIGHER_RATES[-1])), _alpha(16), _alpha(32), _alpha(128))
ALPHA_BY_RATE = replace(
    RATE_BY_RANK,
    name="alpha-by-rate",
    claim="Twice the alpha is half the learning rate",
    expected="with Adam, A and B each move by their own rate, so that only B's half of it follows",
    arms=ALPHAS,
    over="adapter.lora_alpha",
    lines={"alpha": tuple(arm.name for arm in ALPHAS)},
)
TARGETS = Study(
    name="targets",
    claim="All linear layers do better than attention alone, at equal numbers of parameters",
    expected="attention alone loses even at equal numbers (Schulman 2025; arXiv 2405.09673)",
    arms=(
        Arm(name="all-linear, r = 16", settings={"adapter.r": 16}, rates=LORA_RATES),
        Arm(name="MLP, r = 25", settings={"adapter.r": 25, "adapter.target_modules": "mlp"}, rates=(*LORA_RATES, 3e-2)),
        Arm(
            name="attention, r = 42",
            settings={"adapter.r": 42, "adapter.target_modules": "attention"},
            rates=(*LORA_RATES, 3e-2),
        ),
        Arm(
            name="q and v, r = 83",
            settings={"adapter.r": 83, "adapter.target_modules": ("q_proj", "v_proj")},
            rates=(*LORA_RATES, 3e-2),
        ),
    ),
    reading="best",
)
LOW_RANK = Study(
    name="low-rank",
    claim="The updates of fine-tuning have low rank",
    expected="r = 8 and r = 64 share their first directions, other seeds too (arXiv 2106.09685, section 7); full fine-tuning has "
    "10 to 100 times the rank of LoRA in code and mathematics (arXiv 2405.09673)",
    arms=(
        Arm(name="r = 8", settings={"adapter.r": 8}, rates=(1e-3,)),
        Arm(name="r = 64", settings={"adapter.r": 64}, rates=(1e-3,)),
        Arm(name="full", rates=(3e-4,), full=True),
    ),
    reading="spectra",
    probes=("spectra",),
)
PROVED = Study(
    name="proved",
    claim="Zero at the start, the base frozen, and no latency after merging",
    expected="by construction (arXiv 2106.09685, section 4)",
    arms=tuple(
        Arm(name=dtype, settings={"adapter.r": 16}, rates=(1e-3,), dtype=dtype) for dtype in ("bfloat16", "float32")
    ),
    reading="proof",
    examples=64,
    held_out=32,
    seeds=1,
    apart=True,
    probes=("promises",),
    hours=0.5,
)
VARIANTS = Study(
    name="variants",
    claim="Variants of LoRA at their own best learning rates: what differs beyond noise",
    expected="within 1 to 2 % of each other (arXiv 2602.04998)",
    arms=(
        Arm(name="LoRA", settings={"adapter.r": 16}, rates=LORA_RATES),
        Arm(name="rsLoRA", settings={"adapter.r": 16, "adapter.use_rslora": True}, rates=LORA_RATES),
        Arm(name="DoRA", settings={"adapter.r": 16, "adapter.use_dora": True}, rates=LORA_RATES),
        Arm(
            name="PiSSA",
            settings={"adapter.r": 16, "adapter.lora_alpha": 16, "adapter.init_lora_weights": "pissa_niter_4"},
            rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
        ),
        Arm(
            name="LoRA+",
            settings={"adapter.r": 16, "training.loraplus_lr_ratio": 16.0},
            rates=(5e-5, 1.5e-4, 5e-4, 1.5e-3),
        ),
    ),
    reading="best",
)
SENTIMENT = Study(
    name="matches-full-sentiment",
    claim="LoRA matches full fine-tuning of a small encoder",
    expected=MATCHES_FULL.expected,
    arms=(
        *(Arm(name=f"r = {r}", settings={"adapter.r": r}, rates=LORA_RATES) for r in (1, 4, 16)),
        Arm(name="full", rates=(1e-5, 3e-5, 1e-4, 3e-4), full=True),
    ),
    reading="best",
    material="vader",
    examples=1024,
    held_out=512,
    hours=1.0,
)
STUDIES = {
    study.name: study
    for study in (
        SENTIMENT,
        MATCHES_FULL,
        MATCHES_FULL_LONGER,
        MATCHES_FULL_VERSES,
        FORGETS_LESS,
        COSTS_LESS,
        RATE_BY_RANK,
        ALPHA_BY_RATE,
        TARGETS,
        LOW_RANK,
        PROVED,
        VARIANTS,
    )
}
