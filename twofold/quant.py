"""Linear weights in four or eight bits, frozen: how they are packed, and the products over them.

**NF4** (QLoRA, arXiv 2305.14314): 64 values in a row share a scale, their largest magnitude, and each is stored as the nearest
of 16 levels, the quantiles of a normal distribution. With *double quantisation* the scales, less their mean, are themselves
stored in eight bits, 256 of them to a float32 scale: 4.127 bits a weight in all, against 4.5. The bits are those of
bitsandbytes, whose kernels pack and unpack them on CPU and GPU.

**int8**: each row of the matrix has a scale, its largest magnitude / 127, and its values are rounded to whole multiples of it
(the weights of LLM.int8, arXiv 2208.07339; inputs stay what they are).

A product unpacks the weight into the type it was packed from, which passes and is never kept: the backward unpacks it again.
So a quantised layer computes exactly what a dense layer with the unpacked values would.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["nf4", "int8"]
BLOCK, SCALES_BLOCK = 64, 256
"""Values that share a scale, and scales that share one of their own."""
SLICE = 1 << 22
"""Values that are packed at a time: packing takes some twenty bytes for each."""
MOST = 127
"""The largest whole number of a signed byte's symmetric range."""


@dataclass(frozen=True)
class Scheme:
    """How weights are to be packed.

    Attributes:
        kind: `nf4` or `int8`.
        double: whether NF4's scales are themselves quantised.
    """

    kind: Kind
    double: bool = True

    def __str__(self) -> str:
        return self.kind + (" without double quantisation" if self.kind == "nf4" and not self.double else "")


@dataclass(frozen=True)
class QuantisedWeight(ABC):
    """A packed matrix (out, in) whose products are those of its unpacked values.

    Attributes:
        packed: the codes, uint8 or int8.
        shape: (out, in) of the unpacked matrix.
        dtype: the type it is unpacked into, which is that it was packed from.
    """

    packed: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def dequantised(self) -> Tensor:
        """The unpacked matrix (out, in), new each time."""

    @abstractmethod
    def scales(self) -> dict[str, Tensor]:
        """What the codes are multiplied by, by field name, to be kept beside them."""

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + b: (..., in) to (..., out), in x's type."""
        return F.linear(x, self.dequantised().to(x.dtype), bias)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy W: (..., out) to (..., in), in dy's type."""
        return dy @ self.dequantised().to(dy.dtype)


@dataclass(frozen=True)
class NF4Weight(QuantisedWeight):
    """Codes (values / 2, 1), two to a byte, and a scale for each 64 values, row after row.

    Attributes:
        absmax: (values / 64,) float32, or their codes in uint8 under double quantisation, and then:
        offset: () what was subtracted from all scales before, float32.
        nested_absmax: (values / 64 / 256,) the scales of what was left, float32.
        nested_levels: (256,) what a scale's code stands for, float32: signed, closer together near zero.
    """

    absmax: Tensor
    offset: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_levels: Tensor | None = None

    def scales(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("absmax", "offset", "nested_absmax", "nested_levels")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def dequantised(self) -> Tensor:
        """The same, unpacked as rows of one block each: bitsandbytes 0.50.2 reads wrong scales on a CPU where blocks go across
        rows."""
        filler = -self.packed.numel() % (BLOCK // 2)
        packed = F.pad(self.packed.view(-1), (0, filler)) if filler else self.packed
        blocks: Tensor = _bitsandbytes().dequantize_4bit(packed, self.state((len(self.absmax), BLOCK)))
        return blocks.view(-1)[: self.shape[0] * self.shape[1]].view(self.shape)

    def state(self, shape: Sequence[int]) -> Any:
        """The scales as bitsandbytes passes them about, a `QuantState`, to unpack into this shape."""
        library = _bitsandbytes()
        nested = None
        if self.nested_absmax is not None:
            nested = library.QuantState(
                self.nested_absmax, code=self.nested_levels, blocksize=SCALES_BLOCK, dtype=torch.float32
            )
        return library.QuantState(
            self.absmax,
            shape=torch.Size(shape),
            code=library.get_4bit_type("nf4", device=self.absmax.device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
            offset=self.offset,
            state2=nested,
        )


@dataclass(frozen=True)
class Int8Weight(QuantisedWeight):
    """Codes (out, in) in int8.

    Attributes:
        row_scale: (out,) float32.
    """

    row_scale: Tensor

    def scales(self) -> dict[str, Tensor]:
        return {"row_scale": self.row_scale}

    def dequantised(self) -> Tensor:
        unpacked = torch.empty(self.shape, dtype=self.dtype, device=self.packed.device)
        return torch.mul(self.packed, self.row_scale[:, None], out=unpacked)  # multiplied in float32, rounded once


WEIGHTS: Mapping[Kind, type[NF4Weight | Int8Weight]] = {"nf4": NF4Weight, "int8": Int8Weight}


@torch.no_grad()
def quantise(weight: Tensor, scheme: Scheme) -> NF4Weight | Int8Weight:
    """Pack a matrix (out, in) of a 16- or 32-bit type, where it lies; it is left as it is."""
    return _to_nf4(weight, double=scheme.double) if scheme.kind == "nf4" else _to_int8(weight)


def roundtrip(weight: Tensor, scheme: Scheme) -> Tensor:
    """What packing leaves of a matrix (out, in): packed and unpacked again, in its own type."""
    return quantise(weight, scheme).dequantised()


def _to_nf4(weight: Tensor, *, double: bool) -> NF4Weight:
    shape, flat = _matrix(weight), weight.reshape(-1)
    parts = [_pack(part) for part in flat.split(SLICE)]
    packed, absmax = torch.cat([p for p, _ in parts]), torch.cat([a for _, a in parts])
    if not double:
        return NF4Weight(packed, shape, weight.dtype, absmax)
    offset = absmax.mean()
    codes, state = _bitsandbytes().quantize_blockwise(absmax - offset, blocksize=SCALES_BLOCK)
    return NF4Weight(packed, shape, weight.dtype, codes, offset, state.absmax, state.code)


def _pack(part: Tensor) -> tuple[Tensor, Tensor]:
    packed, state = _bitsandbytes().quantize_4bit(part, blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax


def _to_int8(weight: Tensor) -> Int8Weight:
    shape = _matrix(weight)
    row_scale = weight.abs().amax(1).float() / MOST
    steps = 1 / row_scale.clamp_min(torch.finfo(torch.float32).tiny)
    packed = torch.empty(shape, dtype=torch.int8, device=weight.device)
    rows = max(1, SLICE // shape[1])
    for codes, part, step in zip(packed.split(rows), weight.split(rows), steps.split(rows), strict=True):
        codes.copy_((part.float() * step[:, None]).round_())
    return Int8Weight(packed, shape, weight.dtype, row_scale)


def _matrix(weight: Tensor) -> torch.Size:
    if weight.dim() != 2:
        raise ValueError(f"only matrices are quantised, not a tensor of shape {tuple(weight.shape)}")
    return weight.shape


def _bitsandbytes() -> Any:
    """Its functions; loaded when the first weight is packed, quietly: on a CPU it warns of kernels that it could download."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional
