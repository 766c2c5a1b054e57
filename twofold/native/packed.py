"""Matrices in the order in which the kernels read them, and back again."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.machine import zeros_in_large_pages
from twofold.native.build import library
from twofold.quant import Int8Weight

WIDTH = 16
"""Outputs in a block; ranks are filled up to a multiple of it, and inputs of every kernel must be one."""
STEP = 64
"""Bytes that a block's outputs have side by side."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_A, _I = ctypes.c_void_p, ctypes.c_int64


class Packed:
    """A matrix (out, in) in the order in which the kernels read it: its very values, or codes and scales of one in eight bits.

    Args:
        matrix: float32 or bfloat16, or an `Int8Weight` of such.
        into: where its bytes go; they get room of their own if it is not given.

    Attributes:
        dtype: of the inputs that it multiplies.
        scale: (out,) of codes, float32; None for values as they are.
    """

    def __init__(self, matrix: Float[Tensor, "out in_"] | Int8Weight, into: Tensor | None = None) -> None:
        self.out, self.in_ = matrix.shape
        self.dtype = matrix.dtype
        self.scale = matrix.row_scale.contiguous() if isinstance(matrix, Int8Weight) else None
        self.bytes = torch.empty(packed_bytes(matrix), dtype=torch.uint8) if into is None else into
        self.put(0, matrix.packed if isinstance(matrix, Int8Weight) else matrix)

    @classmethod
    def empty(cls, out: int, in_: int, dtype: torch.dtype, into: Tensor) -> Packed:
        """One whose rows are put in later."""
        made = cls.__new__(cls)
        made.out, made.in_, made.dtype, made.scale, made.bytes = out, in_, dtype, None, into
        return made

    @property
    def address(self) -> int:
        return self.bytes.data_ptr()

    def put(self, first: int, rows: Tensor) -> None:
        """Pack some of its rows, values or codes; the first is a multiple of WIDTH, and so is their number but at the end."""
        rows = rows.detach().contiguous()
        at = self.address + first // WIDTH * -(-self.in_ // self._inputs) * STEP
        getattr(library(), f"pack_{self._name}")(_A(rows.data_ptr()), _I(len(rows)), _I(self.in_), _A(at))

    def codes(self, rows: Int[Tensor, " n"]) -> Tensor:
        """Some rows as they were packed: values, or codes."""
        found = torch.empty(len(rows), self.in_, dtype=self.dtype if self.scale is None else torch.int8)
        call = getattr(library(), f"unpack_{self._name}")
        rows = rows.contiguous().long()
        call(_A(self.address), _I(self.in_), _A(rows.data_ptr()), _I(len(rows)), _A(found.data_ptr()))
        return found

    def rows(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n in_"]:
        """Some rows as values, new each time."""
        found = self.codes(rows)
        if self.scale is None:
            return found
        return Int8Weight(found, found.shape, self.dtype, self.scale[rows]).dequantised()

    @property
    def _name(self) -> str:
        return DTYPES[self.dtype] if self.scale is None else f"codes_{DTYPES[self.dtype]}"

    @property
    def _inputs(self) -> int:
        size = self.dtype.itemsize if self.scale is None else 1
        return STEP // (WIDTH * size)


def packed_bytes(matrix: Float[Tensor, "out in_"] | Int8Weight) -> int:
    """How many bytes a matrix has when it is packed; what is beyond its edges is filled up."""
    size = 1 if isinstance(matrix, Int8Weight) else matrix.element_size()
    return -(-matrix.shape[0] // WIDTH) * -(-matrix.shape[1] // (STEP // (WIDTH * size))) * STEP


class Room:
    """One piece of memory, in large pages where the system has them, in which matrices lie in the order in which they are read.

    It takes memory as it is filled.
    """

    def __init__(self, size: int) -> None:
        self._free = zeros_in_large_pages([size], torch.empty(0, dtype=torch.uint8))

    def pack(self, matrix: Float[Tensor, "out in_"] | Int8Weight) -> Packed:
        """Pack a matrix behind those that are here."""
        return Packed(matrix, self.take(packed_bytes(matrix)))

    def take(self, size: int) -> Tensor:
        """The next bytes."""
        taken, self._free = self._free[:size], self._free[size:]
        return taken
