"""Keys and values of the tokens already seen: one slot a stream, filled from the left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SlotCache:
    """Preallocated keys and values (streams, kv_heads, capacity, d) of every layer, and how far each slot is filled."""

    def __init__(
        self, layers: int, streams: int, kv_heads: int, capacity: int, d: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, streams, kv_heads, capacity, d)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.filled = [0] * streams  # in Python: a GPU need not be waited for to know them

    def write(
        self,
        layer: int,
        positions: Int[Tensor, "streams new"],
        keys: Float[Tensor, "streams new kv_heads d"],
        values: Float[Tensor, "streams new kv_heads d"],
    ) -> None:
        """Put the newest tokens of every stream at their positions."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.keys[layer].transpose(1, 2)[rows, positions] = keys
        self.values[layer].transpose(1, 2)[rows, positions] = values

    def spread(self) -> None:
        """Give every slot what slot 0 holds: a prefix that all share is computed once."""
        length = self.filled[0]
        self.keys[:, 1:, :, :length] = self.keys[:, :1, :, :length]
        self.values[:, 1:, :, :length] = self.values[:, :1, :, :length]
        self.filled = [length] * len(self.filled)

    def keep(self, streams: Sequence[int]) -> None:
        """Drop all other slots."""
        at = torch.tensor(list(streams), device=self.keys.device)
        self.keys, self.values = self.keys.index_select(1, at), self.values.index_select(1, at)
        self.filled = [self.filled[i] for i in streams]
