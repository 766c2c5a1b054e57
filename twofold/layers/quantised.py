"""A frozen linear map whose weight is packed in four or eight bits, and what others call one."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.errors import ConfigError
from twofold.lowrank.linear import Projection, group_product
from twofold.quant import BLOCK, MOST, WEIGHTS, Int8Weight, Kind, NF4Weight, Scheme, quantise


class QuantisedLinear(nn.Module):
    """y = x Wᵀ + b over a packed W (out, in); nothing but x's gradient is ever formed.

    `weight` holds the codes, and buffers hold their scales, so that they move and are counted like any other's. Until
    `pack` is called there are none.
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, scheme: Scheme) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device="meta"), requires_grad=False)
        self.bias = bias
        self.dtype: torch.dtype = torch.float32
        """Of the unpacked weight, which is that of the products."""
        self._scales: tuple[str, ...] = ()

    @classmethod
    def from_dense(cls, weight: Float[Tensor, "out in_"], bias: nn.Parameter | None, scheme: Scheme) -> QuantisedLinear:
        """Pack a weight."""
        return cls.holding(quantise(weight, scheme), bias)

    @classmethod
    def holding(cls, weight: NF4Weight | Int8Weight, bias: nn.Parameter | None) -> QuantisedLinear:
        """Over a weight that is packed already, whose tensors it shares."""
        kind: Kind = "nf4" if isinstance(weight, NF4Weight) else "int8"
        made = cls(weight.shape[1], weight.shape[0], bias, Scheme(kind, kind == "int8" or "offset" in weight.scales()))
        made.weight = made._take(weight)
        return made

    def pack(self, weight: Float[Tensor, "out in_"]) -> nn.Parameter:
        """The codes of a weight, for whoever sets `weight`; their scales are taken in here."""
        return self._take(quantise(weight, self.scheme))

    def _take(self, packed: NF4Weight | Int8Weight) -> nn.Parameter:
        for name, scale in packed.scales().items():
            self.register_buffer(name, scale)
        self.dtype, self._scales = packed.dtype, tuple(packed.scales())
        return nn.Parameter(packed.packed, requires_grad=False)

    def frozen(self) -> NF4Weight | Int8Weight:
        """The weight as it multiplies."""
        scales = {name: cast(Tensor, getattr(self, name)) for name in self._scales}
        return WEIGHTS[self.scheme.kind](
            self.weight, torch.Size((self.out_features, self.in_features)), self.dtype, **scales
        )

    def forward(self, x: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        (y,) = group_product(x, [Projection(self.frozen(), self.bias, None)])
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


def frozen_of(module: nn.Module) -> NF4Weight | Int8Weight | None:
    """The packed weight of a module of ours or of bitsandbytes', as it lies; None for any other module."""
    if isinstance(module, QuantisedLinear):
        return module.frozen()
    if not type(module).__module__.startswith("bitsandbytes.nn"):
        return None
    return _of_4bit(module) or _of_8bit(module)


def _of_4bit(module: Any) -> NF4Weight | None:
    """Of a `Linear4bit`; None where its levels are others, or a CPU's inference pass has shuffled its codes."""
    state = getattr(module.weight, "quant_state", None)
    if state is None or (state.quant_type, state.blocksize) != ("nf4", BLOCK):
        return None
    if getattr(state, "packing_format_for_cpu", False):
        raise ConfigError(
            "bitsandbytes has repacked this model's 4-bit weights for generating on a CPU, and only its own kernel reads "
            "them now; load the model anew and attach the adapter first"
        )
    nested = state.state2
    own = (state.offset, nested.absmax, nested.code) if nested is not None else ()
    return NF4Weight(module.weight.data, state.shape, state.dtype, state.absmax, *own)


def _of_8bit(module: Any) -> Int8Weight | None:
    """Of a `Linear8bitLt` that was quantised; its own forward also rounds its inputs, a product with this weight does not."""
    weight, state = module.weight, getattr(module, "state", None)
    row_scale = getattr(weight, "SCB", None)
    if row_scale is None and state is not None:
        row_scale = state.SCB
    if weight.dtype is not torch.int8 or row_scale is None:
        return None
    return Int8Weight(weight.data, weight.shape, torch.float32, row_scale.float() / MOST)


def packed_as(model: nn.Module) -> Scheme | None:
    """How a model's linear layers are packed, if any is."""
    return next((m.scheme for m in model.modules() if isinstance(m, QuantisedLinear)), None)


def values_of(model: nn.Module) -> int:
    """How many values the parameters of a module and of all below it stand for: packed ones are counted unpacked."""
    return sum(p.numel() for p in model.parameters()) + sum(map(unpacked, model.modules()))


def unpacked(module: nn.Module) -> int:
    """How many more values its packed weight stands for than it has codes; 0 where it is not packed."""
    weight = frozen_of(module)
    return 0 if weight is None else weight.shape[0] * weight.shape[1] - cast(Tensor, module.weight).numel()
