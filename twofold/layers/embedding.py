"""LoRA over a frozen embedding: rows of Aᵀ are looked up, so the update of a row is scale · B A[:, row]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from twofold.functional.widen import in_own_precision
from twofold.layers.dora import DoraLayer, MatrixShare
from twofold.layers.linear import combined
from twofold.layers.protocol import adopt
from twofold.lowrank.factors import LowRank, folded, merged_weight
from twofold.lowrank.init import Factors


class EmbeddingShare(MatrixShare):
    """One adapter's factors over one embedding: A (r, vocabulary), B (dim, r); of DoRA `magnitude` (dim,), else None."""

    def __init__(self, factors: Factors, scale: float) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(factors[0]), nn.Parameter(factors[1])
        self.register_parameter("magnitude", None)
        self.scale = scale

    def low_rank(self) -> LowRank:
        """Its update of the (dim, vocabulary) matrix, at the weight it is active with."""
        return LowRank(self.A, self.B, self.scale * self.weight_when_active)

    def saved(self, base: nn.Module) -> dict[str, Tensor]:
        found = {"lora_embedding_A": self.A.detach(), "lora_embedding_B": self.B.detach()}
        return found if self.magnitude is None else {**found, "lora_magnitude_vector": self.magnitude.detach()}

    @torch.no_grad()
    def load(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        adopt(self.A, tensors["lora_embedding_A"])
        adopt(self.B, tensors["lora_embedding_B"])
        if self.magnitude is not None:
            adopt(self.magnitude, tensors["lora_magnitude_vector"])


class LoraEmbedding(DoraLayer):
    """y = W0[ids] + Σ weight · scale · A[:, ids]ᵀ Bᵀ over the active shares.

    With DoRA, c ⊙ (W0[ids] + scale · A[:, ids]ᵀ Bᵀ), with c of each of the dim columns of the table, as PEFT has it.
    """

    @classmethod
    def from_base(cls, base: nn.Module) -> LoraEmbedding:
        """Wrap a frozen embedding; nothing is copied."""
        return cls(base)

    def matrix(self) -> Float[Tensor, "dim vocabulary"]:
        """The table on its side, as the updates are of it."""
        return self.weight.T

    def _shares_now(self) -> list[EmbeddingShare]:
        return cast(list[EmbeddingShare], self.active())

    def _factor(self) -> Tensor | float:
        """Gemma scales its embeddings after the look-up; an update of the table is scaled with it."""
        return getattr(self.base, "embed_scale", 1.0)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        shares = self._shares_now()
        if shares and (self.merged is not None or self.folding):
            return F.embedding(ids, in_own_precision(self._merged_now, self.weight)) * self._factor()
        y: Tensor = self.base(ids)
        for share in shares:
            update = share.low_rank()
            rows = F.embedding(ids, update.A.T) @ update.B.T
            y = y + (rows * (update.scale * self._factor())).to(y.dtype)
        stretch = self.stretch(shares)
        return y if stretch is None else (y * stretch).to(y.dtype)

    def delta(self) -> Float[Tensor, "vocabulary dim"]:
        """The sum of the active updates of the table, in float32 or wider."""
        total = torch.zeros_like(self.weight, dtype=torch.float32)
        for share in self._shares_now():
            total = total + share.low_rank().delta().T
        stretch = self.stretch(self._shares_now())
        return total if stretch is None else (total + self.weight) * stretch - self.weight

    @torch.no_grad()
    def fold(self) -> Float[Tensor, "vocabulary dim"]:
        """A new table with the active updates in it, rounded once to the base's type."""
        shares = self._shares_now()
        update = combined([s.low_rank() for s in shares])
        if update is None or self.stretch(shares) is not None:
            return merged_weight(self.weight, [self.delta()])
        return folded(self.weight, update.transposed())

    def folded(self) -> dict[str, Tensor]:
        return {"weight": self.fold()}
