"""Several adapters trained over one pass of the base: rows lie grouped by adapter, and each group has updates of its own.

The products with frozen weights are made once over all rows, forward and backward; what each adapter adds, and learns, is
computed on its own rows, which are views. So nothing is done twice and nothing too much, as in serving (`grouped.py`), but
with gradients. It pays where one adapter's rows are too few to keep the machine's products busy; every adapter's values
differ from those it has alone only in how products of other sizes round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from twofold.lowrank.linear import Group, Kept, Member, learned_gradients, rank_gradient
from twofold.lowrank.products import Term, crossed, sum_of_products


@dataclass(frozen=True)
class JoinedGroup(Group):
    """The same projections under several adapters.

    Attributes:
        members: the base's, without updates.
        parts: each adapter's own group.
        cuts: the rows of each.
        query_cuts: the same among the rows that ask, of which the first member is made alone in a model's last layer.
    """

    parts: tuple[Group, ...] = ()
    cuts: tuple[slice, ...] = ()
    query_cuts: tuple[slice, ...] = ()

    @classmethod
    def join(cls, parts: Sequence[Group], cuts: Sequence[slice], query_cuts: Sequence[slice]) -> JoinedGroup:
        """From the groups of each adapter, in the order of their rows.

        Raises:
            ValueError: a part drops inputs, stretches its output or learns a bias, which is not done on joined rows.
        """
        if any(p.dropout or any(m.stretch is not None or m.learns_bias for m in p.members) for p in parts):
            raise ValueError("adapters with dropout, DoRA or a bias of their own are not trained on joined rows")
        return cls(_bare(parts[0]), None, 0.0, tuple(parts), tuple(cuts), tuple(query_cuts))

    @property
    def learns(self) -> bool:
        return any(p.learns for p in self.parts)

    @property
    def learns_A(self) -> bool:
        return any(p.learns_A for p in self.parts)

    def part(self, at: slice) -> JoinedGroup:
        """Of some neighbouring members; the first alone is that of the rows that ask."""
        cuts = self.query_cuts if at == slice(0, 1) else self.cuts
        return JoinedGroup(self.members[at], None, 0.0, tuple(p.part(at) for p in self.parts), cuts, self.query_cuts)

    def forward(self, x: Tensor, kept: Kept | None, onto: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        outputs = [sum_of_products([Term(x, m.weight)], m.bias) for m in self.members]
        widths = [0 if p.A is None else len(p.A) for p in self.parts]
        if not any(widths):
            return _on_top(outputs, onto), None
        h = x.new_zeros(len(x), max(widths))
        for part, cut, width in zip(self.parts, self.cuts, widths, strict=True):
            if part.A is not None:
                h[cut, :width] = sum_of_products([Term(x[cut], part.A)])
                for y, m in zip(outputs, part.members, strict=True):
                    if m.B is not None:
                        y[cut].addmm_(h[cut, m.columns], m.B.T, alpha=m.scale)
        return _on_top(outputs, onto), h

    def backward(
        self,
        gradients: Sequence[Tensor],
        x: Tensor | None,
        kept: Kept | None,
        h: Tensor | None,
        *,
        input_gradient: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """What is learned comes member by member, and of each member adapter by adapter."""
        dx = None
        if input_gradient:
            terms = zip(gradients, self.members, strict=True)
            dx = sum_of_products([Term(dy, m.weight, as_read=True) for dy, m in terms])
        found = [
            self._part_backward(part, cut, gradients, x, h, dx) for part, cut in zip(self.parts, self.cuts, strict=True)
        ]
        return dx, [t for member in range(len(self.members)) for learned in found for t in learned[member]]

    def _part_backward(
        self,
        part: Group,
        cut: slice,
        gradients: Sequence[Tensor],
        x: Tensor | None,
        h: Tensor | None,
        dx: Tensor | None,
    ) -> list[list[Tensor]]:
        """What one adapter learns, by member; its share of dx is added in place."""
        if part.A is None:
            return [[] for _ in part.members]
        own = [dy[cut] for dy in gradients]
        g, dA = rank_gradient(own, part), None
        if part.learns_A and x is not None:
            dA = crossed(g, x[cut])
        if dx is not None:
            dx[cut].addmm_(g, part.A)
        h_own = None if h is None else h[cut]
        return [learned_gradients(dy, dy, h_own, dA, m) for dy, m in zip(own, part.members, strict=True)]


def _on_top(outputs: list[Tensor], onto: Tensor | None) -> list[Tensor]:
    return outputs if onto is None else [y.add_(onto) for y in outputs]


def _bare(group: Group) -> tuple[Member, ...]:
    return tuple(replace(m, B=None, learns_A=False, learns_B=False, columns=None) for m in group.members)


def cut_rows(counts: Sequence[int]) -> tuple[slice, ...]:
    """The rows of each of several blocks that lie end to end."""
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return tuple(slice(a, b) for a, b in pairwise(ends))
