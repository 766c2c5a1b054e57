"""Adapters folded into a second copy of the weights, for as long as all traffic is theirs.

A stream with an adapter of its own pays for the product of low rank. Where every row of many passes in a row has the same
adapters, a second copy of what they change is made, W + scale·B A rounded once to the type of the weights, a slice a pass,
while the passes go on as they did. From then on such passes run over the copy alone. One row of anybody else, and a pass
runs over the weights as they are, with the adapters beside them: both lie ready, so neither way waits for anything, and no
weight is ever changed back. What a row says is the same but for the rounding of the folded weights.

The copy takes the memory of what is changed, once: it is given up when other adapters are to be folded in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.engine.laid import Laid, Place
from twofold.engine.resident import Change, Resident
from twofold.engine.step import Part, Worn
from twofold.errors import ConfigError
from twofold.native.packed import WIDTH, Packed, Room

SLICE = 1 << 19
"""Weights that one pass folds: two or three milliseconds."""


class Folded:
    """The weights with some adapters folded in, while that is done and after."""

    def __init__(self, base: Laid, worn: Worn) -> None:
        self.worn, self.base = worn, base
        changed = {place for resident, _ in worn for place in resident.changes}
        self._room = Room(sum(len(base.places[place].weight.bytes) for place in changed))
        self._work, self._laid = self._fold(changed), base

    @property
    def whole(self) -> bool:
        return self._laid is not self.base

    def go_on(self) -> Laid | None:
        """The weights if they are ready, else None after one more slice."""
        if not self.whole:
            next(self._work, None)
        return self._laid if self.whole else None

    def _fold(self, changed: Set[int]) -> Iterator[None]:
        found: list[Place] = []
        for number, place in enumerate(self.base.places):
            if number not in changed:
                found.append(place)
                continue
            old = place.weight
            new = Packed.empty(old.out, old.in_, old.dtype, self._room.take(len(old.bytes)))
            rows = max(WIDTH, SLICE // old.in_ // WIDTH * WIDTH)
            for first in range(0, old.out, rows):
                at = torch.arange(first, min(first + rows, old.out))
                new.put(first, self._folded(number, old.rows(at).float(), at).to(old.dtype))
                yield
            found.append(Place(new, self._bias(number), place.widths))
        self._laid = Laid.of(found, self.base.layers)

    def _folded(self, number: int, matrix: Float[Tensor, "n in_"], at: Int[Tensor, " n"]) -> Float[Tensor, "n in_"]:
        """Some rows of a place with what the adapters change in them, in float32."""
        for change, weight, member, where in self._members(number, at):
            part = matrix[member]
            if (update := change.update) is not None:
                part.addmm_(update.B[where].float(), update.A.float(), alpha=update.scale * weight)
            if change.stretch is not None:
                part.mul_(change.stretch[where, None])
        return matrix

    def _bias(self, number: int) -> Tensor | None:
        place = self.base.places[number]
        changes = list(self._members(number, torch.arange(place.weight.out)))
        if all(change.bias is None for change, *_ in changes):
            return place.bias
        found = torch.zeros(place.weight.out) if place.bias is None else place.bias.to(torch.float32, copy=True)
        for change, weight, member, _ in changes:
            if change.bias is not None:
                found[member] += weight * change.bias
        return found.to(place.weight.dtype)

    def _members(self, number: int, at: Int[Tensor, " n"]) -> Iterator[tuple[Change, float, slice, slice]]:
        """Each change of a projection that some of these rows belong to: how much of it, which of them, and which of its own."""
        first, last = int(at[0]), int(at[-1]) + 1
        for resident, weight in self.worn:
            end = 0
            for change, width in zip(
                resident.changes.get(number, ()), self.base.places[number].widths.tolist(), strict=False
            ):
                start, end = end, end + width
                low, high = max(start, first), min(end, last)
                if change is not None and low < high:
                    yield change, weight, slice(low - first, high - first), slice(low - start, high - start)


class Hot:
    """The adapters that all traffic has, and the weights with them folded in.

    Args:
        base: the weights as they are.
        after: passes in a row with the same adapters after which these are folded in; None for never.

    Raises:
        ConfigError: weights are in eight bits, and would be rounded anew with the adapters in them.
    """

    def __init__(self, base: Laid, after: int | None) -> None:
        if after is not None and any(place.weight.scale is not None for place in base.places):
            raise ConfigError("adapters are never merged into weights in eight bits, so leave out one of the two")
        self.base, self.after = base, after
        self._alike: tuple[Worn, int] = ((), 0)
        self._folded: Folded | None = None

    def laid_for(self, parts: Sequence[Part]) -> Laid | None:
        """The weights with what all of these parts have folded in, if they are ready; one slice nearer to it otherwise."""
        worn = parts[0].worn
        if self.after is None or not worn or any(p.worn != worn for p in parts) or not _foldable(worn):
            self._alike = ((), 0)
            return None
        self._alike = (worn, self._alike[1] + 1 if self._alike[0] == worn else 1)
        if self._folded is None or self._folded.worn != worn:
            if self._alike[1] < self.after:
                return None
            self._folded = Folded(self.base, worn)
        return self._folded.go_on()

    @property
    def ready(self) -> Worn:
        """The adapters that are folded in, all of them."""
        return self._folded.worn if self._folded is not None and self._folded.whole else ()

    def forget(self, resident: Resident) -> None:
        """The adapter is no longer there, nor is what it was folded into."""
        if self._folded is not None and any(r is resident for r, _ in self._folded.worn):
            self._folded = None
        self._alike = ((), 0)


def _foldable(worn: Worn) -> bool:
    """Whether the sum of what they change is one matrix: what stretches outputs stands alone."""
    return len(worn) == 1 or not any(
        c and c.stretch is not None for r, _ in worn for g in r.changes.values() for c in g
    )
