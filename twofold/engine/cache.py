"""Keys and values of the tokens already seen: one slot a stream, filled from the left.

A slot remembers what was in it when its stream ended. A new stream with the same adapters (the same content, at the same weights)
whose prompt begins with the same tokens goes on from there: in that slot, or from a copy where a running stream still holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from twofold.base.blocks import Decoder
from twofold.machine import zeros_in_large_pages

Wearer = tuple[tuple[str, float], ...]
"""Which adapters made what a slot holds, and how much of each."""

WORTH_A_COPY = 16
"""Tokens from which a prefix is copied out of another slot rather than computed again."""


@dataclass
class _Slot:
    """What a slot holds: `tokens` of a stream of some `wearer`, and when it was last given back (0: in use)."""

    tokens: list[int] = field(default_factory=list)
    wearer: Wearer = ()
    freed: int = 1


class Slots:
    """What each slot holds; where the keys and values are is a subclass's affair.

    Args:
        capacity: tokens that a slot has room for.
        reuse: whether prompts may go on from what a slot holds already.
    """

    def __init__(self, count: int, capacity: int, *, reuse: bool) -> None:
        self.count, self.capacity, self.reuse = count, capacity, reuse
        self._slots = [_Slot() for _ in range(count)]
        self._clock = 1

    @property
    def free(self) -> int:
        """Slots that no stream has."""
        return sum(1 for s in self._slots if s.freed)

    @property
    def used(self) -> float:
        """The share of the places for tokens that running streams fill."""
        return sum(len(s.tokens) for s in self._slots if not s.freed) / (self.count * self.capacity)

    def take(self, prompt: list[int], wearer: Wearer) -> tuple[int, int]:
        """A free slot, and how many tokens of the prompt it holds already; never all, since the last one's logits are wanted."""
        alike = [self._alike(s, prompt[:-1], wearer) for s in self._slots]
        free = [i for i, s in enumerate(self._slots) if s.freed]
        chosen = max(free, key=lambda i: (alike[i], -len(self._slots[i].tokens), -self._slots[i].freed))
        best, known = max(range(self.count), key=alike.__getitem__), alike[chosen]
        if alike[best] >= known + WORTH_A_COPY:
            known = alike[best]
            self.copy(best, chosen, known)
        self.clear(chosen, known)
        self._slots[chosen] = _Slot(prompt[:known], wearer, freed=0)
        return chosen, known

    def _alike(self, slot: _Slot, prompt: list[int], wearer: Wearer) -> int:
        if not self.reuse or slot.wearer != wearer:
            return 0
        return common_prefix(slot.tokens, prompt)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give one slot the first keys and values of another."""
        raise NotImplementedError

    def clear(self, slot: int, kept: int) -> None:
        """Let nothing behind the first so many tokens of a slot be seen by whoever has it next."""

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """Note that a pass has put these tokens behind what the slot holds."""
        self._slots[slot].tokens.extend(tokens)

    def give_back(self, slot: int) -> None:
        """The slot's stream has ended; what it holds may still be of use."""
        self._clock += 1
        self._slots[slot].freed = self._clock

    def forget(self, adapter: str) -> None:
        """Nothing may go on from what streams with this adapter have left."""
        for i, slot in enumerate(self._slots):
            if any(key == adapter for key, _ in slot.wearer):
                self.clear(i, 0)
                slot.tokens, slot.wearer = [], ()


def slot_bytes(decoder: Decoder, capacity: int) -> int:
    """What a slot of so many tokens takes: their keys and values in every layer."""
    values = len(decoder.blocks) * decoder.heads.keys * capacity * decoder.head_dim
    return 2 * values * cast(Tensor, decoder.norm.weight).element_size()


class SlotCache(Slots):
    """Preallocated keys and values (slots, kv_heads, capacity, d) of every layer."""

    def __init__(
        self, layers: int, slots: int, kv_heads: int, capacity: int, d: int, like: Tensor, *, reuse: bool
    ) -> None:
        super().__init__(slots, capacity, reuse=reuse)
        shape = (layers, slots, kv_heads, capacity, d)
        self.keys, self.values = (zeros_in_large_pages(shape, like) for _ in range(2))

    def copy(self, source: int, target: int, tokens: int) -> None:
        for kept in (self.keys, self.values):
            kept[:, target, :, :tokens] = kept[:, source, :, :tokens]

    def clear(self, slot: int, kept: int) -> None:
        """A value that overflowed counts even at a probability of 0: 0 · NaN is NaN."""
        self.values[:, slot, :, kept : len(self._slots[slot].tokens)] = 0


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with: halves are compared whole, which Python does fast."""
    known, end = 0, min(len(a), len(b))
    while known < end:
        middle = (known + end + 1) // 2
        if a[known:middle] == b[known:middle]:
            known = middle
        else:
            end = middle - 1
    return known
