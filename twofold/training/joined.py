"""One pass over the base for the batches of several adapters, each on rows of its own (`lowrank/joined.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from twofold.base.batch import PackedBatch
from twofold.base.blocks import Block, Decoder, norm_of
from twofold.functional.loss import HeadLoss, head_loss
from twofold.functional.norm import rms_norm
from twofold.functional.segments import Segment
from twofold.layers.block import BlockTensors
from twofold.layers.linear import projection_of
from twofold.layers.protocol import Adapters
from twofold.lowrank.joined import JoinedGroup, cut_rows
from twofold.lowrank.linear import Group, Projection
from twofold.training.block import asked_states
from twofold.training.layout import ROW_MULTIPLE, Layout, lay_out


@dataclass(frozen=True)
class JoinedDecoder(Decoder):
    """A decoder whose rows belong to several adapters.

    Attributes:
        adapters: those of the model.
        names: the adapters of the rows, in their order.
        cuts: the rows of each, and among the rows that ask.
    """

    adapters: Adapters
    names: tuple[str, ...]
    cuts: tuple[slice, ...]
    query_cuts: tuple[slice, ...]

    def tensors(self, block: Block) -> tuple[BlockTensors, list[Tensor]]:
        """As of any decoder, with each adapter's updates on its own rows."""
        with only(self.adapters, {}):
            base, _ = super().tensors(block)
        found = [self._projections(name, block) for name in self.names]
        asked = (self.cuts, *(3 * [self.query_cuts if block is self.blocks[-1] else self.cuts]))
        qkv, o, gate_up, down = (
            JoinedGroup.join([Group.of(p, self.dtype) for p in parts], cuts, self.query_cuts)
            for parts, cuts in zip(zip(*found, strict=True), asked, strict=True)
        )
        learned = [
            tensor
            for parts in zip(*found, strict=True)
            for member in zip(*parts, strict=True)
            for projection in member
            for tensor in projection.learned()
        ]
        return replace(base, qkv=qkv, o=o, gate_up=gate_up, down=down), learned

    def _projections(self, name: str, block: Block) -> list[list[Projection]]:
        with only(self.adapters, {name: 1.0}):
            return [[projection_of(m) for m in modules] for modules in block.projections()]


@contextmanager
def only(adapters: Adapters, weights: dict[str, float]) -> Iterator[None]:
    """Let these adapters count for a moment; what learns stays as it is."""
    before = adapters.weights
    adapters.weights = weights
    try:
        yield
    finally:
        adapters.weights = before


class Joined(NamedTuple):
    """Layouts end to end, and the rows of each: all, and those that ask."""

    layout: Layout
    cuts: tuple[slice, ...]
    query_cuts: tuple[slice, ...]


def join(layouts: Sequence[Layout]) -> Joined:
    """One layout of several. The filler at its end is nobody's, and a segment of its own, the last: attention reads there what has
    no place, and an adapter that diverged would otherwise spoil the others from there."""
    cuts = cut_rows([one.rows for one in layouts])
    query_cuts = cut_rows([len(one.asked) for one in layouts])
    filler = torch.zeros(ROW_MULTIPLE if len(layouts) > 1 else 0, dtype=torch.long)
    end = cuts[-1].stop
    apart = (Segment(end, len(filler), prefix_start=end),) if len(filler) else ()
    last = end + len(filler) - 1
    shifted = list(zip(layouts, (c.start for c in cuts), strict=True))
    whole = Layout(
        token_ids=torch.cat([*(one.token_ids for one in layouts), filler]),
        positions=torch.cat([*(one.positions for one in layouts), filler]),
        texts=tuple(t for one in layouts for t in one.texts),
        own=tuple(_moved(s, by) for one, by in shifted for s in one.own),
        segments=(*(_moved(s, by) for one, by in shifted for s in one.segments), *apart),
        asked=torch.cat([*(one.asked + by for one, by in shifted), filler + last]),
        predicting=torch.cat([one.predicting + q.start for one, q in zip(layouts, query_cuts, strict=True)]),
        labels=torch.cat([one.labels for one in layouts]),
    )
    return Joined(whole, cuts, query_cuts)


def _moved(segment: Segment, by: int) -> Segment:
    return segment._replace(start=segment.start + by, prefix_start=segment.prefix_start + by)


def joined_losses(
    decoder: Decoder, adapters: Adapters, batches: Mapping[str, PackedBatch], *, recompute: bool, share: bool
) -> list[HeadLoss]:
    """The summed loss of each adapter over its own batch, from one pass.

    Args:
        decoder: the described model, to which all of `adapters` are attached.
        batches: by adapter name; something must be supervised in each.
    """
    found = join([lay_out(b, share=share) for b in batches.values()])
    own = {f.name: getattr(decoder, f.name) for f in fields(Decoder)}
    several = JoinedDecoder(
        **own, adapters=adapters, names=tuple(batches), cuts=found.cuts, query_cuts=found.query_cuts
    )
    hidden = asked_states(several, found.layout, recompute=recompute)
    labels = found.layout.labels.to(hidden.device)
    rows = hidden.index_select(0, found.layout.predicting.to(hidden.device))
    normed = rms_norm(rows, norm_of(decoder.norm))
    head = cast(Tensor, decoder.head.weight)
    cuts = cut_rows([b.supervised_tokens for b in batches.values()])
    return [head_loss(normed[cut], head, labels[cut], decoder.logit_softcap) for cut in cuts]


def rows_of(batch: PackedBatch, *, share: bool) -> int:
    """How many rows a batch makes."""
    return lay_out(batch, share=share).rows
