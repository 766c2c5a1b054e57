"""How many parameters an adapter has over a base: exact, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.target import ModuleShape, find_targets


@dataclass(frozen=True)
class ParameterPlan:
    """Numbers of parameters.

    Attributes:
        base: of the frozen model.
        trainable: of the adapter, with modules that are trained whole.
        adapted_base: of the weights that get factors.
        modules: adapted modules.
        largest: values in the largest weight that gets factors.
    """

    base: int
    trainable: int
    adapted_base: int
    modules: int
    largest: int

    @property
    def fraction(self) -> float:
        return self.trainable / self.base


def plan_parameters(config: LoraConfig, shapes: Mapping[str, ModuleShape], base: int) -> ParameterPlan:
    """Count, by the same targets and ranks that training uses.

    Raises:
        TargetError: an entry of the config matches nothing.
    """
    targets = find_targets(config, shapes)
    factors = sum(lora_parameters(resolve(config, n).r, s) for n, s in targets.adapted.items())
    biases = sum(s.out_features for s in targets.adapted.values() if s.bias and config.bias != "none")
    saved = sum(shapes[n].parameters for n in targets.saved)
    adapted = [s.in_features * s.out_features for s in targets.adapted.values()]
    return ParameterPlan(
        base=base,
        trainable=factors + biases + saved,
        adapted_base=sum(adapted),
        modules=len(adapted),
        largest=max(adapted, default=0),
    )


def lora_parameters(r: int, shape: ModuleShape) -> int:
    """r (in + out): 65,536 for 4096 x 4096 at r = 8, 256 times fewer than the weight itself."""
    return r * (shape.in_features + shape.out_features)
