"""How many parameters an adapter has over a base: exact, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.parameters import ParameterShape
from twofold.adapter.shapes import ModuleShape
from twofold.adapter.target import find_targets
from twofold.adapter.variants import check_variants


@dataclass(frozen=True)
class ParameterPlan:
    """Numbers of parameters.

    Attributes:
        base: of the frozen model.
        trainable: of the adapter, with modules that are trained whole.
        linear: weights of the base's linear layers but its head: what 4-bit and 8-bit bases quantise.
        modules: adapted modules.
        ranks: the sum of their ranks.
        adapted_inputs: the sum of their input widths.
        dora_outputs: the sum of their output widths, of DoRA; 0 without.
        adapted_base: values of the weights that get factors.
        largest: values of the largest of these.
    """

    base: int
    trainable: int
    linear: int
    modules: int
    ranks: int
    adapted_inputs: int
    dora_outputs: int
    adapted_base: int
    largest: int

    @property
    def fraction(self) -> float:
        return self.trainable / self.base


def plan_parameters(config: LoraConfig, shapes: Mapping[str, ModuleShape], base: int) -> ParameterPlan:
    """Count, by the same targets and ranks that training uses.

    Raises:
        TargetError: an entry of the config matches nothing.
        ConfigError: a variant or a start is asked of a module that it is not defined for.
    """
    targets = find_targets(config, shapes)
    check_variants(config, targets)
    ranks = {name: resolve(config, name).r for name in targets.adapted}
    factors = sum(_share_parameters(config, ranks[n], s) for n, s in targets.adapted.items())
    biases = sum(s.out_features for s in targets.adapted.values() if s.bias and config.bias != "none")
    biases += sum(shapes[n].out_features for n in targets.biased)
    factors += sum(
        lora_parameters(resolve(config, f"{n}.{p.name}").r, p) for n, ps in targets.parameters.items() for p in ps
    )
    rows = sum(len(found) * _width(shapes[n]) for n, found in targets.tokens.items() if n not in targets.tied)
    saved = sum(shapes[n].parameters for n in targets.saved)
    linear = [s for s in shapes.values() if s.kind in ("linear", "conv1d") and not s.head]
    adapted = [s.in_features * s.out_features for s in targets.adapted.values()]
    return ParameterPlan(
        base=base,
        trainable=factors + biases + saved + rows,
        linear=sum(s.in_features * s.out_features for s in linear),
        modules=len(adapted),
        ranks=sum(ranks.values()),
        adapted_inputs=sum(s.in_features for s in targets.adapted.values()),
        dora_outputs=sum(s.out_features for s in targets.adapted.values()) if config.use_dora else 0,
        adapted_base=sum(adapted),
        largest=max(adapted, default=0),
    )


def plan_full(shapes: Mapping[str, ModuleShape], base: int) -> ParameterPlan:
    """The same where all of the base learns and there is no adapter."""
    linear = [s for s in shapes.values() if s.kind in ("linear", "conv1d")]
    weights = sum(s.in_features * s.out_features for s in linear if not s.head)
    return ParameterPlan(
        base=base,
        trainable=base,
        linear=weights,
        modules=len(linear),
        ranks=0,
        adapted_inputs=0,
        dora_outputs=0,
        adapted_base=0,
        largest=0,
    )


def _share_parameters(config: LoraConfig, r: int, shape: ModuleShape) -> int:
    """What learns of one module's share besides its base's bias: the factors, DoRA's row lengths, B's bias."""
    frozen = r * shape.in_features if config.freeze_a else 0
    return lora_parameters(r, shape) - frozen + shape.out_features * (config.use_dora + config.lora_bias)


def _width(shape: ModuleShape) -> int:
    """The length of a token's row."""
    return shape.out_features if shape.kind == "embedding" else shape.in_features


def lora_parameters(r: int, shape: ModuleShape | ParameterShape) -> int:
    """r (in + out): 65,536 for 4096 x 4096 at r = 8, 256 times fewer than the weight itself."""
    return r * shape.parameters_per_rank
