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
from twofold.layers.dora import DoraLayer, MatrixShare
from twofold.layers.protocol import Share, adopt, bias_of
from twofold.layers.quantised import QuantisedLinear, frozen_of
from twofold.layers.rows import Rows
from twofold.lowrank.factors import LowRank, folded
from twofold.lowrank.grouped import Spread, grouped_update
from twofold.lowrank.linear import Projection, group_product
from twofold.lowrank.products import Frozen
from twofold.quant import QuantisedWeight


class LinearShare(MatrixShare):
    """One adapter's factors over one linear map: A (r, in), B (out, r), in float32 or wider; and its own bias, if any.

    `bias_change` (out,) is what the adapter adds to the base's bias, zero at the start; `cast` is A and B in the type of the
    products, and `norms` DoRA's, within `cast_once`. What a variant adds is None in plain LoRA:

    Attributes:
        b_bias: (out,), a bias of B, scaled as the update is (`lora_bias`).
        magnitude: (out,), the lengths of the merged weight's rows (DoRA).
        start_A, start_B: the factors at the start, from which the update is counted (PiSSA, OLoRA, LoRA-GA).
    """

    cast: tuple[Tensor, Tensor] | None = None
    norms: Tensor | None = None
    A: Tensor
    B: nn.Parameter
    bias_change: nn.Parameter | None
    b_bias: nn.Parameter | None
    magnitude: nn.Parameter | None
    start_A: Tensor | None
    start_B: Tensor | None
    scale: float
    dropout: float

    def __init__(
        self,
        factors: tuple[Tensor, Tensor],
        scale: float,
        dropout: float = 0.0,
        bias_change: Float[Tensor, " out"] | None = None,
    ) -> None:
        super().__init__()
        change = None if bias_change is None else nn.Parameter(bias_change)
        A, B = nn.Parameter(factors[0]), nn.Parameter(factors[1])
        self._parameters.update(A=A, B=B, bias_change=change, b_bias=None, magnitude=None)  # as assigning them does
        self._buffers.update(start_A=None, start_B=None)
        self.__dict__.update(scale=scale, dropout=dropout)

    def count_from_start(self) -> None:
        """From now on the update is s·BA − s·B0A0, with the factors as they are now for B0 and A0."""
        self.start_A, self.start_B = self.A.detach().clone(), self.B.detach().clone()

    def freeze_A(self) -> None:
        """Make A a constant, which no optimiser and no `requires_grad_` reaches (LoRA-FA, arXiv 2308.03303)."""
        A = self.A.detach()
        del self.A
        self.register_buffer("A", A)

    def low_rank(self) -> LowRank:
        """Its update, at the weight it is active with.

        Counted from a start it is s·BA − s·B0A0 = s·(B − B0)A + s·B0(A − A0): written so, it is zero to the last bit at the
        start, and rounding the factors to a narrow type loses nothing of small changes.
        """
        scale = self.scale * self.weight_when_active
        if self.start_A is None or self.start_B is None:
            return LowRank(self.A, self.B, scale)
        changed = self.B - self.start_B
        if not isinstance(self.A, nn.Parameter):
            return LowRank(self.A, changed, scale)
        return LowRank(torch.cat([self.A, self.A - self.start_A]), torch.cat([changed, self.start_B], 1), scale)

    def bias_added(self) -> Float[Tensor, " out"] | None:
        """What it adds to the bias at weight 1, if anything."""
        scaled = None if self.b_bias is None else self.b_bias * self.scale
        if self.bias_change is None or scaled is None:
            return self.bias_change if scaled is None else scaled
        return self.bias_change + scaled

    def saved(self, base: nn.Module) -> dict[str, Tensor]:
        return self._named(self.A.detach(), self.B.detach(), base)

    def plain(self, base: nn.Module) -> dict[str, Tensor]:
        """As `saved`, but where the update is counted from a start, the factors of that difference: of twice the rank."""
        if self.start_A is None:
            return self.saved(base)
        update = self.low_rank()
        return self._named(update.A.detach(), update.B.detach(), base)

    def _named(self, A: Tensor, B: Tensor, base: nn.Module) -> dict[str, Tensor]:
        found = {"lora_A.weight": A, "lora_B.weight": B}
        if self.b_bias is not None:
            found["lora_B.bias"] = self.b_bias.detach()
        if self.magnitude is not None:
            found["lora_magnitude_vector"] = self.magnitude.detach()
        if self.bias_change is not None:
            found["base_layer.bias"] = bias_of(base) + self.bias_change.detach()
        return found

    @torch.no_grad()
    def load(self, base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        adopt(self.A, tensors["lora_A.weight"])
        adopt(self.B, tensors["lora_B.weight"])
        if self.b_bias is not None:
            adopt(self.b_bias, tensors["lora_B.bias"])
        if self.magnitude is not None:
            adopt(self.magnitude, tensors["lora_magnitude_vector"])
        if self.bias_change is not None:
            self.bias_change.copy_(tensors["base_layer.bias"].to(self.bias_change) - bias_of(base))


class LoraLinear(DoraLayer):
    """y = x W0ᵀ + b + Σ weight · scale · (dropout(x) Aᵀ) Bᵀ over the active shares, arXiv 2106.09685.

    With DoRA, y = c ⊙ (x W0ᵀ + scale · (dropout(x) Aᵀ) Bᵀ) + b, where c = magnitude / ||W0 + scale·BA|| row by row.
    """

    @classmethod
    def from_base(cls, base: nn.Module) -> LoraLinear:
        """Wrap a frozen linear module; nothing is copied."""
        if frozen_of(base) is not None:
            return LoraQuantised(base)
        return (LoraConv1D if isinstance(base, Conv1D) else LoraLinear)(base)

    def matrix(self) -> Float[Tensor, "out in_"]:
        """The base weight as (out, in), a view."""
        return self.weight

    def frozen(self) -> Tensor | Frozen:
        """The base weight as it multiplies."""
        return self.matrix()

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.weight.dtype

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
            return Projection(in_own_precision(self._merged_now, self.weight), effective_bias(self.bias, shares), None)
        cast_before = shares[0].cast if len(shares) == 1 else None
        return Projection(
            self.frozen(),
            effective_bias(self.bias, shares),
            combined([s.low_rank() for s in shares]),
            cast_before,
            self.stretch(shares),
        )

    def row_norms(self, share: MatrixShare) -> Float[Tensor, " out"]:
        """As they stand now, or within `cast_once` as they stood."""
        kept = share.norms if isinstance(share, LinearShare) else None
        return super().row_norms(share) if kept is None else kept

    def forward(self, x: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        shares = self.linear_shares()
        if not shares:
            return cast(Tensor, self.bare(x))
        (y,) = project(x, self)
        return y

    def by_rows(self, rows: Rows, *args: Any, **named: Any) -> Tensor:
        """The base's product over all rows at once, and what each row's adapters add to it."""
        found = [(i, s) for i, s in enumerate(map(self.by_name().get, rows.names)) if s is not None]
        (x,) = args or (None,)
        if named or x is None or len(x) != len(rows.weights) or not all(_only_adds(s) for _, s in found):
            return super().by_rows(rows, *args, **named)
        y: Tensor = self.bare(x)
        if not found:
            return y
        shares = cast(list[LinearShare], [s for _, s in found])
        weights = rows.weights[:, [i for i, _ in found]]
        each = weights.repeat_interleave(x[0].numel() // x.shape[-1], 0)
        updates = [LowRank(s.A, s.B, s.scale) for s in shares]
        y = y + grouped_update(x.reshape(-1, x.shape[-1]), updates, Spread.of(each, x.device)).view(y.shape)
        changes = [s.bias_added() for s in shares]
        if any(c is not None for c in changes):
            stacked = torch.stack(
                [s.B.new_zeros(len(s.B)) if c is None else c for s, c in zip(shares, changes, strict=True)]
            )
            y = y + (each.to(stacked) @ stacked).view(y.shape).to(y.dtype)
        return y

    @torch.no_grad()
    def delta(self) -> Float[Tensor, "out in_"]:
        """What the active updates add to the weight, in float32 or wider."""
        if self.stretch(self.linear_shares()) is None:
            return self._added()
        return self._wide_fold() - self.matrix()

    def _added(self) -> Float[Tensor, "out in_"]:
        update = combined([s.low_rank() for s in self.linear_shares()])
        return torch.zeros_like(self.matrix(), dtype=torch.float32) if update is None else update.delta()

    @torch.no_grad()
    def fold(self, into: Float[Tensor, "out in_"] | None = None) -> Float[Tensor, "out in_"]:
        """A new weight with the active updates in it, rounded once to the base's type; in memory that is given, or its own."""
        shares = self.linear_shares()
        update = combined([s.low_rank() for s in shares])
        return self.matrix().clone() if update is None else folded(self.matrix(), update, self.stretch(shares), into)

    def _wide_fold(self) -> Float[Tensor, "out in_"]:
        stretch = self.stretch(self.linear_shares())
        added = self._added()
        total = added.add_(self.matrix())
        return total if stretch is None else total.mul_(stretch[:, None])

    def folded(self) -> dict[str, Tensor]:
        bias = self.folded_bias()
        return {"weight": self._laid(self.fold())} | ({} if bias is None else {"bias": bias})

    def folded_bias(self) -> Float[Tensor, " out"] | None:
        """The bias with what the active shares add to it.

        Raises:
            ConfigError: the base has none.
        """
        bias = effective_bias(self.bias, self.linear_shares())
        if bias is not None and self.bias is None:
            raise ConfigError(
                "an adapter with lora_bias gives a bias to layers that have none in this model, so it cannot be merged into its "
                "files; serve it beside the base"
            )
        return None if bias is None else bias.detach().clone()

    def _laid(self, matrix: Float[Tensor, "out in_"]) -> Tensor:
        """A matrix as the base lays it."""
        return matrix


class LoraConv1D(LoraLinear):
    """The same over Hugging Face's Conv1D, whose weight lies as (in, out)."""

    def matrix(self) -> Float[Tensor, "out in_"]:
        return self.weight.T

    def _laid(self, matrix: Float[Tensor, "out in_"]) -> Tensor:
        return matrix.T.contiguous()


class LoraQuantised(LoraLinear):
    """The same over a weight in four or eight bits, ours or bitsandbytes'; merged weights are 16-bit, beside it."""

    def matrix(self) -> Float[Tensor, "out in_"]:
        return self._packed().dequantised()

    def frozen(self) -> Frozen:
        return self._packed()

    def bare(self, x: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        """Never the base's own forward, which in bitsandbytes' modules may shuffle the codes, or round x."""
        (y,) = group_product(x, [Projection(self.frozen(), self.bias, None)])
        return y

    def _packed(self) -> QuantisedWeight:
        return cast(QuantisedWeight, frozen_of(self.base))

    @property
    def dtype(self) -> torch.dtype:
        return self._packed().dtype


def _only_adds(share: Share) -> bool:
    """Whether a share is A and B, and at most changes of the bias: whatever else it has may do more than add to the output."""
    own = {name for name, value in {**share._parameters, **share._buffers}.items() if value is not None}
    return isinstance(share, LinearShare) and own <= {"A", "B", "bias_change", "b_bias"} and "A" in share._parameters


def effective_bias(bias: Tensor | None, shares: Iterable[LinearShare]) -> Tensor | None:
    """A base's bias with what the shares add to it."""
    for share in shares:
        added = share.bias_added()
        if added is not None:
            change = added * share.weight_when_active
            bias = change if bias is None else bias + change.to(bias.dtype)
    return bias


def combined(updates: list[LowRank]) -> LowRank | None:
    """One update equal to the sum of several: their factors end to end, each scale folded into its B."""
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
    weight = module.frozen() if isinstance(module, QuantisedLinear) else cast(Tensor, module.weight)
    return Projection(weight, cast(nn.Linear, module).bias, None)


def dropout_of(modules: Iterable[nn.Module]) -> float:
    """The probability with which the input of A is dropped at this moment, in modules that read the same input.

    Raises:
        ConfigError: adapters that train together drop with different probabilities, of which one mask can have but one.
    """
    training = [m for m in modules if isinstance(m, LoraLinear) and m.training and m.merged is None]
    return one_dropout(share.dropout for m in training for share in m.linear_shares())


def one_dropout(probabilities: Iterable[float]) -> float:
    """The one probability of shares that train together, 0 of none."""
    found = sorted(set(probabilities))
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
            share.cast = _cast(share, layer.dtype)
            share.norms = None if share.magnitude is None else layer.row_norms(share)
        yield
    finally:
        for _, share in found:
            share.cast = share.norms = None


@torch.no_grad()
def _cast(share: LinearShare, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    update = share.low_rank()
    return update.A.detach().to(dtype), update.B.detach().to(dtype)
