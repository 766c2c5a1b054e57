"""An adapter in the form in which the engine multiplies by it: what it adds to each projection, by place.

A *place* is a group of projections that read the same input: q, k, v; o; gate, up; down, layer by layer, and last the head. What
the configuration said of ranks, scales and variants is settled here once; the engine only sees factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.adapter.files import reading_adapter
from twofold.base.blocks import Decoder
from twofold.errors import AdapterFileError
from twofold.events import Pieces
from twofold.layers.embedding import EmbeddingShare
from twofold.layers.linear import LinearShare
from twofold.layers.protocol import Share, bare_modules
from twofold.lowrank.dora import row_norms, row_squares
from twofold.lowrank.factors import LowRank
from twofold.lowrank.linear import Projection
from twofold.quant import QuantisedWeight

NORMED_ELEMENTS = 1 << 20
"""Values of a weight whose rows are measured in one piece."""


class Change(NamedTuple):
    """What an adapter does to one projection.

    Attributes:
        bias: what it adds to the output (out,), whatever the input.
        stretch: DoRA's factor of each output (out,), the bias apart.
    """

    update: LowRank | None
    bias: Float[Tensor, " out"] | None
    stretch: Float[Tensor, " out"] | None

    @property
    def only_low_rank(self) -> bool:
        return self.bias is None and self.stretch is None


Changes = Mapping[int, tuple[Change | None, ...]]
"""By place, one for each projection of the group."""


@dataclass(frozen=True, eq=False)
class Resident:
    """One adapter, ready to be used.

    Attributes:
        key: its name in the pool.
        changes: to the projections and the head.
        tokens: of the embedding: A (r, vocabulary) and B (d, r).
        compiled: what the operations keep of it in a form of their own, which knows its `bytes`.
    """

    key: str
    changes: Changes
    tokens: LowRank | None = None
    compiled: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def special(self) -> frozenset[int]:
        """The places whose outputs it changes by more than a product of low rank."""
        return frozenset(p for p, found in self.changes.items() if any(c and not c.only_low_rank for c in found))

    @property
    def bytes(self) -> int:
        """Of its factors, and of what the operations keep beside them."""
        found = [t for group in self.changes.values() for c in group if c is not None for t in _tensors(c)]
        found += [] if self.tokens is None else [self.tokens.A, self.tokens.B]
        beside: int = sum(kept.bytes for kept in self.compiled.values())
        return sum(t.nbytes for t in found) + beside


def _tensors(change: Change) -> Iterator[Tensor]:
    if change.update is not None:
        yield from (change.update.A, change.update.B)
    yield from (t for t in (change.bias, change.stretch) if t is not None)


def places(decoder: Decoder) -> list[tuple[nn.Module, ...]]:
    """The modules of each place."""
    return [group for block in decoder.blocks for group in block.projections()] + [(decoder.head,)]


class Reader:
    """Reads adapters for one model, which stays as it is.

    Args:
        weights: the model's projections by place and member; DoRA's lengths are of their rows.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, weights: list[list[Projection]]) -> None:
        self.model, self.decoder, self.weights = model, decoder, weights
        self.places = places(decoder)
        self.names = {module: name for name, module in bare_modules(model)}
        self.device = cast(Tensor, decoder.norm.weight).device

    def reading(self, key: str, folder: Path) -> Pieces[Resident]:
        """The adapter of a folder, its factors in the type of the products.

        Raises:
            AdapterFileError: the files do not fit the model, or the adapter changes what the engine keeps fixed.
        """
        dtype = self.decoder.dtype
        fitted = yield from reading_adapter(self.model, folder, key)
        made, changes = dict(fitted.made), {}
        for place, modules in enumerate(self.places):
            found = []
            for i, module in enumerate(modules):
                found.append((yield from self._change(place, i, made.pop(self.names[module], None), dtype)))
            if any(c is not None for c in found):
                changes[place] = tuple(found)
        tokens = made.pop(self.names[self.decoder.embedding], None)
        if made:
            listed = ", ".join(f"'{m}'" for m in list(made)[:4])
            raise AdapterFileError(
                f"the adapter at {folder} changes {listed}, which rows of one batch cannot each have their own of; merge it "
                "into a base of its own (twofold merge) and serve that"
            )
        factor = float(getattr(self.decoder.embedding, "embed_scale", 1.0))
        return Resident(key, changes, None if tokens is None else _tokens(tokens.share, folder, dtype, factor))

    @torch.no_grad()
    def _change(self, place: int, member: int, made: Any, dtype: torch.dtype) -> Pieces[Change | None]:
        if made is None:
            return None
        yield
        share = made.share
        if not isinstance(share, LinearShare):
            raise AdapterFileError(
                f"'{self.names[made.base]}' has a whole copy or a bias alone in this adapter; merge it instead"
            )
        plain = share.plain(made.base)
        update = LowRank(plain["lora_A.weight"], plain["lora_B.weight"], share.scale)
        bias = None if share.bias_change is None else share.bias_change.detach().float()
        if share.b_bias is not None:
            bias = share.b_bias.detach().float() * share.scale + (0.0 if bias is None else bias)
        stretch = None
        if share.magnitude is not None:
            norms = yield from _norms(_values(self.weights[place][member]), update)
            stretch = share.magnitude.detach().float() / norms
        return Change(_narrowed(update, dtype, self.device), bias, stretch)


def _values(projection: Projection) -> Float[Tensor, "out in_"]:
    weight = projection.weight
    return weight.dequantised() if isinstance(weight, QuantisedWeight) else cast(Tensor, weight).detach()


def _norms(matrix: Float[Tensor, "out in_"], update: LowRank) -> Pieces[Float[Tensor, " out"]]:
    """||W + scale B A|| of each row, of some rows in a piece."""
    step, found = max(1, NORMED_ELEMENTS // matrix.shape[1]), []
    for rows, B in zip(matrix.split(step), update.B.split(step), strict=True):
        yield
        found.append(row_norms(rows, row_squares(rows), LowRank(update.A, B, update.scale)))
    return torch.cat(found)


def _narrowed(update: LowRank, dtype: torch.dtype, device: torch.device) -> LowRank:
    A, B = (t.detach().to(device, dtype).contiguous() for t in (update.A, update.B))
    return LowRank(A, B, update.scale)


def _tokens(share: Share, folder: Path, dtype: torch.dtype, factor: float) -> LowRank:
    if not isinstance(share, EmbeddingShare):
        raise AdapterFileError(
            f"the adapter at {folder} brings new or whole token rows; merge it (twofold merge) and serve that"
        )
    return LowRank(share.A.detach().to(dtype), share.B.detach().to(dtype), share.scale * factor)


def of_projections(key: str, found: list[list[Projection]], dtype: torch.dtype) -> Resident | None:
    """The adapters that are active on a live model, as one; None without any."""
    changes = {}
    for place, group in enumerate(found):
        live = tuple(None if p.update is None else _live(p.update, p.stretch, dtype) for p in group)
        if any(change is not None for change in live):
            changes[place] = live
    return Resident(key, changes) if changes else None


def _live(update: LowRank, stretch: Tensor | None, dtype: torch.dtype) -> Change:
    narrow = _narrowed(update, dtype, update.A.device)
    return Change(narrow, None, None if stretch is None else stretch.detach().float())


def stretch_and_shift(
    y: Float[Tensor, "rows out"],
    resident: Resident,
    place: int,
    widths: Sequence[int],
    rows: list[int],
    weights: list[float],
) -> None:
    """What an adapter does to the outputs of its rows beyond its low rank, in place: y without the base's bias.

    Args:
        widths: of the projections of the place, whose outputs lie side by side.
        rows, weights: the adapter's, and how much of it each has.
    """
    if not rows:
        return
    at, of_each, end = torch.tensor(rows, device=y.device), torch.tensor(weights, device=y.device)[:, None], 0
    for change, width in zip(resident.changes[place], widths, strict=True):
        start, end = end, end + width
        if change is None or change.only_low_rank:
            continue
        found = y[at, start:end].float()
        found = found if change.stretch is None else found * change.stretch
        found = found if change.bias is None else found + of_each * change.bias
        y[at, start:end] = found.to(y.dtype)
