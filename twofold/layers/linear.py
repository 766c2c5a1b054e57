"""LoRA over a frozen linear map: torch's Linear and Hugging Face's Conv1D."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.errors import ConfigError
from twofold.functional.widen import in_own_precision
from twofold.layers.protocol import AdapterLayer, Rows, Share, adopt, bias_of
from twofold.lowrank.factors import LowRank, merged_weight
from twofold.lowrank.grouped import grouped_update
from twofold.lowrank.init import Factors
from twofold.lowrank.linear import Projection, group_product


class LinearShare(Share):
    """One adapter's factors over one linear map: A (r, in), B (out, r), in float32 or wider; and its own bias, if any.

    `bias_change` (out,) is what the adapter adds to the base's bias, zero at the start; `cast` is A and B in the type of the
    products, within `cast_once`.
    """

    cast: tuple[Tensor, Tensor] | None = None

    def __init__(
        self, factors: Factors, scale: float, dropout: float = 0.0, bias_change: Float[Tensor, " out"] | None = None
    ) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(factors[0]), nn.Parameter(factors[1])
        self.bias_change = None if bias_change is None else nn.Parameter(bias_change)
        self.scale, self.dropout = scale, dropout

    def low_rank(self) -> LowRank:
        """Its update, at the weight it is active with."""
        return LowRank(self.A, self.B, self.scale * self.weight_when_active)

    def saved(self, base: nn.Module) -> dict[str, Tensor]:
        found = {"lora_A.weight": self.A.detach(), "lora_B.weight": self.B.detach()}
        if self.bias_change is not None:
            found["base_layer.bias"] = bias_of(base) + self.bias_change.detach()
        return found

    @torch.no_grad()
    def load(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        adopt(self.A, tensors["lora_A.weight"])
        adopt(self.B, tensors["lora_B.weight"])
        if self.bias_change is not None:
            self.bias_change.copy_(tensors["base_layer.bias"].to(self.bias_change) - bias_of(base))


class LoraLinear(AdapterLayer):
    """y = x W0ᵀ + b + Σ weight · scale · (dropout(x) Aᵀ) Bᵀ over the active shares, arXiv 2106.09685."""

    base: nn.Module
    merged: Tensor | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.register_buffer("merged", None, persistent=False)

    @classmethod
    def from_base(cls, base: nn.Module) -> LoraLinear:
        """Wrap a frozen linear module; nothing is copied."""
        return (LoraConv1D if isinstance(base, Conv1D) else LoraLinear)(base)

    def matrix(self) -> Float[Tensor, "out in_"]:
        """The base weight as (out, in), a view."""
        return self.weight

    def linear_shares(self) -> list[LinearShare]:
        """The shares that contribute now."""
        return cast(list[LinearShare], self.active())

    def projection(self) -> Projection:
        """Weight, bias and combined update as they stand now, for callers that fuse several layers.

        Raises:
            ConfigError: within `rows`, where there is no one update for all.
        """
        if self.adapters.rows is not None:
            raise ConfigError(
                "layers cannot be fused over rows that have adapters of their own; call the model as it is"
            )
        shares = self.linear_shares()
        if shares and (self.merged is not None or self.folding):
            return Projection(in_own_precision(self._merged_now, self.weight), self._effective_bias(shares), None)
        cast_before = shares[0].cast if len(shares) == 1 else None
        return Projection(self.matrix(), self._effective_bias(shares), _combined(shares), cast_before)

    def _effective_bias(self, shares: list[LinearShare]) -> Tensor | None:
        bias = self.bias
        for share in shares:
            if share.bias_change is not None and bias is not None:
                bias = bias + (share.bias_change * share.weight_when_active).to(bias.dtype)
        return bias

    def forward(self, x: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        shares = self.linear_shares()
        if not shares:
            return cast(Tensor, self.base(x))
        (y,) = project(x, self)
        return y

    def by_rows(self, rows: Rows, *args: Any, **named: Any) -> Tensor:
        """The base's product over all rows at once, and what each row's adapters add to it."""
        found = [(i, s) for i, s in enumerate(map(self.by_name().get, rows.names)) if s is not None]
        (x,) = args or (None,)
        if named or x is None or len(x) != len(rows.weights) or not all(_only_adds(s) for _, s in found):
            return super().by_rows(rows, *args, **named)
        y: Tensor = self.base(x)
        if not found:
            return y
        shares = cast(list[LinearShare], [s for _, s in found])
        weights = rows.weights[:, [i for i, _ in found]]
        each = weights.repeat_interleave(x[0].numel() // x.shape[-1], 0)
        updates = [LowRank(s.A, s.B, s.scale) for s in shares]
        y = y + grouped_update(x.reshape(-1, x.shape[-1]), updates, each).view(y.shape)
        changes = [torch.zeros(y.shape[-1]).to(s.A) if s.bias_change is None else s.bias_change for s in shares]
        if any(s.bias_change is not None for s in shares):
            y = y + (each.to(changes[0]) @ torch.stack(changes)).view(y.shape).to(y.dtype)
        return y

    def delta(self) -> Float[Tensor, "out in_"]:
        """The sum of the active updates, in float32 or wider."""
        update = _combined(self.linear_shares())
        return torch.zeros_like(self.matrix(), dtype=torch.float32) if update is None else update.delta()

    @torch.no_grad()
    def fold(self) -> Float[Tensor, "out in_"]:
        """A new weight with the active updates in it, rounded once to the base's type."""
        return merged_weight(self.matrix(), [self.delta()])

    def _merged_now(self) -> Float[Tensor, "out in_"]:
        return self.fold() if self.merged is None else self.merged

    def merge(self) -> None:
        self.merged = self.fold()

    def unmerge(self) -> None:
        self.merged = None


class LoraConv1D(LoraLinear):
    """The same over Hugging Face's Conv1D, whose weight lies as (in, out)."""

    def matrix(self) -> Float[Tensor, "out in_"]:
        return self.weight.T


def _only_adds(share: Share) -> bool:
    """Whether a share is A and B, and at most a change of the bias: whatever else it has may do more than add to the output."""
    own = {name for name, value in {**share._parameters, **share._buffers}.items() if value is not None}
    return isinstance(share, LinearShare) and own <= {"A", "B", "bias_change"} and "A" in share._parameters


def _combined(shares: list[LinearShare]) -> LowRank | None:
    """One update equal to the sum of several: their factors end to end, each scale folded into its B."""
    updates = [s.low_rank() for s in shares]
    if len(updates) < 2:
        return updates[0] if updates else None
    return LowRank(torch.cat([u.A for u in updates]), torch.cat([u.B * u.scale for u in updates], dim=1), 1.0)


def project(x: Float[Tensor, "*batch in_"], *modules: nn.Module) -> tuple[Float[Tensor, "*batch _"], ...]:
    """Several linear modules that read the same x, adapted or not, in one fused pass over it."""
    return group_product(x, [projection_of(m) for m in modules], dropout_of(modules))


def projection_of(module: nn.Module) -> Projection:
    """Weight, bias and update of a linear module as they stand now, adapted or not."""
    if isinstance(module, LoraLinear):
        return module.projection()
    linear = cast(nn.Linear, module)
    return Projection(linear.weight, linear.bias, None)


def dropout_of(modules: Iterable[nn.Module]) -> float:
    """The probability with which the input of A is dropped at this moment, in modules that read the same input.

    Raises:
        ConfigError: adapters that train together drop with different probabilities, of which one mask can have but one.
    """
    training = [m for m in modules if isinstance(m, LoraLinear) and m.training and m.merged is None]
    found = sorted({share.dropout for m in training for share in m.linear_shares()})
    if len(found) > 1:
        listed = " and ".join(f"{p:g}" for p in found)
        raise ConfigError(
            f"adapters that are active together have lora_dropout {listed}, but train with one dropout mask; activate those "
            "of one lora_dropout, or call model.eval()"
        )
    return found[0] if found else 0.0


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Within the block, factors are multiplied as they are cast now: once for several passes, between which no factor changes."""
    found = [(layer, s) for layer in model.modules() if isinstance(layer, LoraLinear) for s in layer.linear_shares()]
    try:
        for layer, share in found:
            share.cast = (share.A.detach().to(layer.weight.dtype), share.B.detach().to(layer.weight.dtype))
        yield
    finally:
        for _, share in found:
            share.cast = None
