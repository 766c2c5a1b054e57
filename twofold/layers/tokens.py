"""Single tokens trained whole: some rows of a frozen embedding, and of the heads that are tied to it.

The change of each row is learned, zero at the start; files hold, as PEFT's do, the rows that result, so that new tokens
mean the same over a vocabulary that was resized anew. Only the rows are looked up or multiplied: the table is never copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from twofold.functional.widen import in_own_precision
from twofold.layers.saved import BiasShare, shifted, shifted_bias
from twofold.layers.weights import WeightLayer

ROWS = "token_adapter.trainable_tokens_delta"
BIAS = "token_adapter.base_layer.bias"


class TokensShare(BiasShare):
    """One adapter's change of the rows of some tokens: (n, dim), in float32 or wider; and of a head's bias, if it is given."""

    bias_key = BIAS
    tokens: Tensor

    def __init__(
        self, tokens: Sequence[int], weight: Float[Tensor, "vocabulary dim"], bias: Tensor | None = None
    ) -> None:
        super().__init__(bias)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("tokens", torch.tensor(tokens, device=weight.device), persistent=False)
        self.change = nn.Parameter(torch.zeros(len(tokens), weight.shape[1], dtype=dtype, device=weight.device))

    def _rows(self, base: nn.Module) -> Tensor:
        return cast(Tensor, base.weight)[self.tokens].to(self.change.dtype)

    def saved(self, base: nn.Module) -> dict[str, Tensor]:
        return {ROWS: self._rows(base) + self.change.detach(), **super().saved(base)}

    @torch.no_grad()
    def load(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().load(base, tensors)
        self.change.copy_(tensors[ROWS].to(self.change) - self._rows(base))


class TiedTokens(BiasShare):
    """The rows of another layer's share, over a module that has the same weight: trained and saved there, but for a bias."""

    bias_key = BIAS

    def __init__(self, source: TokensShare, bias: Tensor | None = None) -> None:
        super().__init__(bias)
        self._source = (source,)  # not a module of this one, or its rows would count twice

    @property
    def tokens(self) -> Tensor:
        return self._source[0].tokens

    @property
    def change(self) -> Tensor:
        return self._source[0].change


class Rows(NamedTuple):
    """Rows of a table as they stand now: tokens (n,) in rising order, values (n, dim) in the table's type."""

    tokens: Int[Tensor, " n"]
    values: Float[Tensor, "n dim"]


class TrainedTokens(WeightLayer):
    """An embedding, or a linear head, some rows of whose weight are W0[token] + Σ weight · change[token]."""

    @classmethod
    def from_base(cls, base: nn.Module) -> TrainedTokens:
        """Wrap a frozen embedding or linear map; nothing is copied."""
        return cls(base)

    def _changes(self) -> list[TokensShare | TiedTokens]:
        return cast(list[TokensShare | TiedTokens], self.active())

    def forward(self, x: Tensor) -> Tensor:
        """From ids (...) to (..., dim), or from (..., dim) to (..., vocabulary) over a head."""
        if not self.active():
            return cast(Tensor, self.base(x))
        if self.merged is not None or self.folding:
            return self._whole(x, in_own_precision(self._merged_now, self.weight))
        return self._look_up(x) if isinstance(self.base, nn.Embedding) else self._project(x)

    def _whole(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.base, nn.Embedding):
            return self._scaled(F.embedding(x, weight))
        return F.linear(x, weight, None if self.bias is None else shifted_bias(self.base, self._changes()))

    def _look_up(self, ids: Tensor) -> Tensor:
        rows = self.rows()
        position = torch.searchsorted(rows.tokens, ids).clamp_(max=len(rows.tokens) - 1)
        trained = rows.tokens[position] == ids
        return torch.where(trained[..., None], self._scaled(F.embedding(position, rows.values)), self.base(ids))

    def _scaled(self, found: Tensor) -> Tensor:
        """Gemma scales what it looks up, in the table's type."""
        factor = getattr(self.base, "embed_scale", None)
        return found * factor.to(found.dtype) if isinstance(factor, Tensor) else found * (factor or 1.0)

    def _project(self, x: Tensor) -> Tensor:
        return self.onto(cast(Tensor, self.base(x)), x)

    def onto(self, logits: Float[Tensor, "*batch vocabulary"], x: Float[Tensor, "*batch dim"]) -> Tensor:
        """Over a head: what the frozen weight makes of x, and on top what the trained rows add to the logits of their tokens."""
        tokens, change = _summed(self._changes())
        logits = shifted(logits, self._changes())
        return logits.index_add(-1, tokens, F.linear(x, change.to(x.dtype)).to(logits.dtype))

    def rows(self) -> Rows:
        """The trained rows of all active shares, summed in float32 or wider and rounded once to the weight's type."""
        tokens, change = _summed(self._changes())
        values = self.weight[tokens].to(torch.promote_types(self.weight.dtype, change.dtype)) + change
        return Rows(tokens, values.to(self.weight.dtype))

    def delta(self) -> Float[Tensor, "vocabulary dim"]:
        """The sum of the active changes, as a change of the whole weight."""
        total = torch.zeros_like(self.weight, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        for share in self._changes():
            total = total.index_add(0, share.tokens, (share.change * share.weight_when_active).to(total.dtype))
        return total

    @torch.no_grad()
    def fold(self) -> Float[Tensor, "vocabulary dim"]:
        """A new weight with the trained rows in it."""
        rows = self.rows()
        return self.weight.index_copy(0, rows.tokens, rows.values)

    def folded(self) -> dict[str, Tensor]:
        shifts = any(share.bias_change is not None for share in self._changes())
        bias = {"bias": shifted_bias(self.base, self._changes()).detach()} if shifts else {}
        return {"weight": self.fold()} | bias


def _summed(shares: list[TokensShare | TiedTokens]) -> tuple[Tensor, Tensor]:
    """Tokens in rising order, each once, and the sum of what the shares change their rows by."""
    changes = [s.change * s.weight_when_active for s in shares]
    if len(shares) == 1:
        tokens, order = shares[0].tokens.sort()
        return tokens, changes[0][order]
    tokens = torch.unique(torch.cat([s.tokens for s in shares]))
    total = changes[0].new_zeros(len(tokens), changes[0].shape[1])
    for share, change in zip(shares, changes, strict=True):
        total = total.index_add(0, torch.searchsorted(tokens, share.tokens), change)
    return tokens, total
