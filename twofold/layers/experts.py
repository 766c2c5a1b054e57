"""LoRA over parameters that a module multiplies by itself: the stacked experts of a mixture, or any of two dimensions.

The module runs its own forward, in which each adapted parameter is a tensor that stands for W + Σ weight · scale · B A
(`lowrank/standin.py`), so that no B A is formed for products that are known. In PEFT's files the factors of all experts lie in
two matrices: A (E·r, in), expert by expert; B (out, r·E), in which the expert varies fastest. Several parameters of one module
are told apart by position alone: the last has the plain key, each one before it one more `base_layer.` in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.layers.saved import BiasShare, shifted_bias
from twofold.layers.weights import WeightsLayer
from twofold.lowrank.factors import LowRank, folded
from twofold.lowrank.standin import StandIn, Sum


class ParameterFactors(nn.Module):
    """Factors of one parameter: A (experts, r, in), B (experts, out, r); `transposed` where it lies as (experts, in, out)."""

    def __init__(self, a: Float[Tensor, "experts r in_"], b: Float[Tensor, "experts out r"], transposed: bool) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.transposed = transposed

    def pair(self) -> tuple[Tensor, Tensor]:
        """Left and right factors, as the parameter lies."""
        return (self.A.mT, self.B.mT) if self.transposed else (self.B, self.A)

    def flat(self) -> tuple[Float[Tensor, "ranks in_"], Float[Tensor, "out ranks"]]:
        """As files hold them."""
        return self.A.flatten(0, 1), self.B.permute(1, 2, 0).flatten(1)

    def take(self, a: Float[Tensor, "ranks in_"], b: Float[Tensor, "out ranks"]) -> None:
        experts, r, _ = self.A.shape
        self.A.copy_(a.view(experts, r, -1))
        self.B.copy_(b.view(-1, r, experts).permute(2, 0, 1))


class ParametersShare(BiasShare):
    """One adapter's factors over some parameters of one module, by name, in the module's order; and a change of its bias, if that
    is given."""

    def __init__(
        self, factors: Mapping[str, ParameterFactors], scales: Mapping[str, float], bias: Tensor | None = None
    ) -> None:
        super().__init__(bias)
        self.names = tuple(factors)
        self.factors = nn.ModuleList(factors.values())
        self.scales = dict(scales)
        self.bias_key = "base_layer." * len(self.names) + "bias"

    def of(self, name: str) -> ParameterFactors:
        """The factors of one parameter."""
        return cast(ParameterFactors, self.factors[self.names.index(name)])

    def _prefixes(self) -> dict[str, str]:
        last = len(self.names) - 1
        return {name: "base_layer." * (last - i) for i, name in enumerate(self.names)}

    def saved(self, base: nn.Module) -> dict[str, Tensor]:
        found = super().saved(base)
        for name, prefix in self._prefixes().items():
            a, b = self.of(name).flat()
            found |= {f"{prefix}lora_A.weight": a.detach(), f"{prefix}lora_B.weight": b.detach()}
        return found

    @torch.no_grad()
    def load(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().load(base, tensors)
        for name, prefix in self._prefixes().items():
            self.of(name).take(tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"])


class LoraParameters(WeightsLayer):
    """A module whose own parameters W are W + Σ weight · scale · B A over the active shares while it runs, and its bias b + Σ
    weight · change where they have one."""

    @classmethod
    def from_base(cls, base: nn.Module) -> LoraParameters:
        """Wrap a module with frozen parameters; nothing is copied."""
        return cls(base)

    def _shares_now(self) -> list[ParametersShare]:
        return cast(list[ParametersShare], self.active())

    def changed(self) -> list[str]:
        return self._adapted() + (["bias"] if self._shifts() else [])

    def _adapted(self) -> list[str]:
        """Names of the parameters that have factors."""
        return list(dict.fromkeys(name for share in self._shares_now() for name in share.names))

    def _shifts(self) -> bool:
        return any(share.bias_change is not None for share in self._shares_now())

    def forward(self, *args: Any, **named: Any) -> Any:
        """As the module's own."""
        if not self.active():
            return self.base(*args, **named)
        if self.merged is not None or self.folding:
            return self.run_merged(*args, **named)
        standing: dict[str, Tensor] = {name: StandIn.of(self._sum(name)) for name in self._adapted()}
        if self._shifts():
            standing["bias"] = shifted_bias(self.base, self._shares_now())
        return torch.func.functional_call(self.base, standing, args, named)

    def _sum(self, name: str) -> Sum:
        """One parameter with its updates side by side along the rank, in the parameter's type."""
        weight, (left, right) = self.base.get_parameter(name), self._factors(name)
        return Sum(weight, left.to(weight.dtype), right.to(weight.dtype))

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        pairs = self._pairs(name)
        left = torch.cat([left * scale for left, _, scale in pairs], -1)
        right = torch.cat([right for _, right, _ in pairs], -2)
        return (left, right) if self.base.get_parameter(name).dim() == 3 else (left[0], right[0])

    def _pairs(self, name: str) -> list[tuple[Tensor, Tensor, float]]:
        """Left and right factors of each active share, by expert, and its scale."""
        shares = [s for s in self._shares_now() if name in s.names]
        return [(*s.of(name).pair(), s.scales[name] * s.weight_when_active) for s in shares]

    def update(self, name: str, expert: int) -> LowRank:
        """The sum of the active updates of one expert's matrix, as the parameter lies."""
        pairs = self._pairs(name)
        left = torch.cat([left[expert] * scale for left, _, scale in pairs], -1)
        return LowRank(torch.cat([right[expert] for _, right, _ in pairs], -2), left, 1.0)

    def delta(self, name: str) -> Tensor:
        """The sum of the active updates of one parameter, in float32 or wider."""
        left, right = self._factors(name)
        return left @ right

    @torch.no_grad()
    def fold(self, name: str) -> Tensor:
        if name == "bias":
            return shifted_bias(self.base, self._shares_now())
        weight = self.base.get_parameter(name)
        if weight.dim() == 2:
            return folded(weight, self.update(name, 0))
        made = torch.empty_like(weight)
        for expert, matrix in enumerate(weight):
            made[expert] = folded(matrix, self.update(name, expert))
        return made
