"""How the engine holds a decoder's weights: beside the model's own, in their place, or in eight bits in their place.

In eight bits, each output of a projection or of the head has a scale, its largest weight / 127, and its weights are whole
multiples of it (`twofold.quant`, int8); a tied embedding is the head's, and adapters stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, cast

from torch import Tensor

from twofold.base.blocks import Decoder
from twofold.engine.given import Owners
from twofold.engine.resident import places
from twofold.layers.linear import projection_of
from twofold.lowrank.linear import Projection
from twofold.native.packed import DTYPES, WIDTH, Packed, packed_bytes
from twofold.quant import Int8Weight, Scheme, quantise

Weights = Literal["shared", "taken", "int8"]
"""`shared`: the model keeps its own. `taken`: the engine takes them over, and the model's are unpacked where they are asked for.
`int8`: as taken, in eight bits."""
INT8 = Scheme("int8")
Matrix = Tensor | Int8Weight


def groups_of(decoder: Decoder) -> list[list[Projection]]:
    """Every projection as it stands now, by place and member."""
    return [[projection_of(m) for m in group] for group in places(decoder)]


def why_not_native(decoder: Decoder) -> str | None:
    """What keeps our own kernels from running this decoder, if anything does, compiling them aside."""
    groups = [[p.weight for p in group] for group in groups_of(decoder)]
    found = [w for group in groups for w in group]
    if any(not isinstance(w, Tensor | Int8Weight) for w in found):
        return "the base is quantised in a form that they do not have"
    matrices = cast(list[Matrix], found)
    if any(len({type(w) is Int8Weight for w in group}) > 1 for group in groups):
        return "projections that read the same input are quantised one by one"
    if any(_codes(w).device.type != "cpu" for w in matrices):
        return "the base is not on the CPU"
    if decoder.dtype not in DTYPES or any(w.dtype != decoder.dtype for w in matrices):
        return f"the base is in {decoder.dtype}"
    if decoder.head_dim % WIDTH or any(w.shape[1] % WIDTH for w in matrices):
        return f"its widths are not multiples of {WIDTH}"
    return None


def form_of(weights: Weights) -> Callable[[Matrix], Matrix]:
    """What becomes of a matrix before it is packed."""
    return _in_eight_bits if weights == "int8" else lambda matrix: matrix


def _in_eight_bits(matrix: Matrix) -> Matrix:
    return matrix if isinstance(matrix, Int8Weight) else cast(Int8Weight, quantise(matrix.detach(), INT8))


def packed_size(decoder: Decoder) -> int:
    """No fewer bytes than all weights take when they are packed."""
    whole = sum(packed_bytes(cast(Matrix, p.weight)) for group in groups_of(decoder) for p in group)
    return whole


def give(owners: Owners, projection: Projection, packed: Packed, first: int) -> None:
    """The projection's own parameter is given up for what was packed, from row `first` on."""
    weight = cast(Matrix, projection.weight)
    kept = packed.codes if isinstance(weight, Int8Weight) else packed.rows
    owners.give(_codes(weight), lambda rows: kept(rows + first))


def quantised_in_place(decoder: Decoder, owners: Owners) -> list[list[Projection]]:
    """Every projection in eight bits; the parameters are given up for what is left of them."""
    found = []
    for modules in places(decoder):
        group = [projection_of(m) for m in modules]
        found.append([_quantised(p, owners) if isinstance(p.weight, Tensor) else p for p in group])
    return found


def _quantised(projection: Projection, owners: Owners) -> Projection:
    matrix = cast(Tensor, projection.weight)
    weight = cast(Int8Weight, quantise(matrix.detach(), INT8))
    owners.give(matrix, partial(_rows, weight))
    return projection._replace(weight=weight)


def _rows(weight: Int8Weight, rows: Tensor) -> Tensor:
    some = weight.packed[rows]
    return Int8Weight(some, some.shape, weight.dtype, weight.row_scale[rows]).dequantised()


def _codes(weight: Matrix) -> Tensor:
    return weight.packed if isinstance(weight, Int8Weight) else weight
