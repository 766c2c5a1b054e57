"""What an adapter is: `LoraConfig`, and the one resolver of rank and scale per module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, TypeVar

from twofold.errors import ConfigError
from twofold.lowrank.factors import scale_of
from twofold.lowrank.init import STARTS
from twofold.lowrank.spectral_init import DATA_STARTS, WEIGHT_STARTS, weight_start

V = TypeVar("V")
Names: TypeAlias = str | tuple[str, ...] | list[str]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The settings of a LoRA adapter, with PEFT's names.

    Attributes:
        r: rank of the update: how much it can learn. In short runs r = 1 did as well as r = 64 (docs/evidence, matches-full).
        lora_alpha: volume of the update: it is scaled by lora_alpha / r, with which the best learning rate does not depend on r
            (docs/evidence, rate-by-rank).
        lora_dropout: probability that a value on its way into A is dropped in training.
        target_modules: suffixes of module names, one regular expression for whole names, or a preset:
            `all-linear`, `attention`, `mlp`. Attention alone did worse at equal parameters (docs/evidence, targets).
        exclude_modules: suffixes or one regular expression; what they match is left alone.
        layers_to_transform: indices of the layers to adapt; all of them when not given. Whole names in `target_modules` need none.
        layers_pattern: name of the list of layers that the indices count in, such as `layers`, or several of them.
        rank_pattern: rank by pattern of module name, over `r`; the first pattern that matches counts.
        alpha_pattern: alpha by pattern of module name, over `lora_alpha`.
        use_rslora: scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732).
        bias: which biases are trained: none, those of the adapted modules, or all.
        modules_to_save: suffixes of modules to train whole and keep with the adapter.
        init_lora_weights: the start: true for Kaiming A and zero B; `gaussian`, `orthogonal`, or false for A and B at random;
            `pissa`, `pissa_niter_N` and `olora`, read off the base's weights; `eva` and `lora_ga`, off the first data; `loftq`, off
            what a 4-bit base rounds away. The base is never changed by any.
        use_dora: learn the length of each row of the weight apart from its direction (DoRA, arXiv 2402.09353).
        lora_bias: give B a bias of its own.
        freeze_a: leave A as it starts and train B alone (LoRA-FA, arXiv 2308.03303): fewer values learn, and no inputs are kept.
        target_parameters: names or endings of two- or three-dimensional parameters, such as the stacked experts of a
            mixture: `mlp.experts.gate_up_proj`.
        trainable_token_indices: tokens whose embedding is trained whole, or tokens by name of the embedding; heads that are
            tied to the input embedding follow it.
        ensure_weight_tying: make it an error where tied weights would come apart.
    """

    r: int = 16
    lora_alpha: float | int = 32
    lora_dropout: float | int = 0.0
    target_modules: Names = "all-linear"
    exclude_modules: Names | None = None
    layers_to_transform: tuple[int, ...] | list[int] | int | None = None
    layers_pattern: Names | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float | int] = field(default_factory=dict)
    use_rslora: bool = False
    bias: Literal["none", "lora_only", "all"] = "none"
    modules_to_save: tuple[str, ...] | list[str] | None = None
    init_lora_weights: bool | str = True
    use_dora: bool = False
    lora_bias: bool = False
    freeze_a: bool = False
    target_parameters: tuple[str, ...] | list[str] | None = None
    trainable_token_indices: tuple[int, ...] | dict[str, list[int]] | list[int] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        problems = []
        if any(r < 1 for r in (self.r, *self.rank_pattern.values())):
            problems.append("a rank must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout is {self.lora_dropout} but must be at least 0 and below 1")
        if self.lora_dropout and self.target_parameters:
            problems.append(
                "lora_dropout cannot fall on the inputs of target_parameters, which no layer sees; set it to 0"
            )
        if not (self.target_modules or self.target_parameters or self.trainable_token_indices):
            problems.append("target_modules is empty, so nothing would be trained; try 'all-linear'")
        problems += _variant_problems(self)
        for name in (
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
            "target_parameters",
        ):
            value = getattr(self, name)
            if isinstance(value, list | set):
                object.__setattr__(self, name, tuple(sorted(value) if isinstance(value, set) else value))
            if isinstance(value, int):
                object.__setattr__(self, name, (value,))
        problems += [p for p in map(_pattern_problem, self._patterns()) if p]
        if problems:
            raise ConfigError("; ".join(problems))

    def _patterns(self) -> list[str]:
        whole = [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str)]
        return [*whole, *self.rank_pattern, *self.alpha_pattern]

    @property
    def layers(self) -> frozenset[int] | None:
        """The indices of `layers_to_transform`; None for all layers."""
        given = self.layers_to_transform
        return None if given is None else frozenset([given] if isinstance(given, int) else given)


def check_volume(config: LoraConfig) -> None:
    """Refuse an alpha with which nothing is learned. Files may hold one: their update is silent, or turned round.

    Raises:
        ConfigError: names it.
    """
    alphas = {"lora_alpha": config.lora_alpha, **{f"alpha_pattern '{p}'": a for p, a in config.alpha_pattern.items()}}
    if wrong := [
        f"{name} is {alpha} but must be above 0" for name, alpha in alphas.items() if not 0 < alpha < math.inf
    ]:
        raise ConfigError("; ".join(wrong))


def _pattern_problem(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"'{pattern}' is no regular expression ({error}); a list of names needs none, as in [q_proj, v_proj]"
    return None


def _variant_problems(config: LoraConfig) -> list[str]:
    """What the variants of LoRA cannot do together, whatever the modules."""
    start, problems = config.init_lora_weights, []
    if start not in STARTS and start not in DATA_STARTS and weight_start(start) is None:
        known = ", ".join(str(s).lower() for s in (*STARTS, *WEIGHT_STARTS, "pissa_niter_N", *DATA_STARTS))
        problems.append(f"init_lora_weights is {start!r} but may be {known}")
    if config.lora_bias and config.use_dora:
        problems.append(
            "use_dora cannot go with lora_bias: DoRA rescales the weight's rows, to which a bias of B does not belong; choose one"
        )
    if config.lora_bias and not isinstance(start, bool):
        problems.append(f"lora_bias is only defined for init_lora_weights true and false, not {start}; leave one out")
    ranks = (config.r, *config.rank_pattern.values())
    if start == "orthogonal" and any(r % 2 for r in ranks):
        problems.append("init_lora_weights: orthogonal splits the rank in halves, so every rank must be even")
    return problems


class Resolved(NamedTuple):
    """Rank, alpha and scale of one module."""

    r: int
    alpha: float
    scale: float


def resolve(config: LoraConfig, module: str) -> Resolved:
    """Rank and scale of the update of `module`, the patterns taken into account. Everything asks here."""
    r = _first_match(config.rank_pattern, module, config.r)
    alpha = float(_first_match(config.alpha_pattern, module, config.lora_alpha))
    return Resolved(r, alpha, scale_of(alpha, r, rank_stabilised=config.use_rslora))


def pattern_matches(pattern: str, module: str) -> bool:
    """PEFT's rule: the pattern is the whole name, or its end after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _first_match(patterns: Mapping[str, V], module: str, default: V) -> V:
    if not patterns:
        return default
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, module)), default)
