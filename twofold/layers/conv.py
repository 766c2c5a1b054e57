"""LoRA over a frozen convolution of one, two or three dimensions.

A is a convolution with the base's own kernel, stride, padding, padding mode and dilation, down to r channels; B is a pointwise
one up from them. A convolution after a pointwise one is a convolution, so the update is a kernel of the base's size:

    delta[o, c, k…] = scale · Σ_r B[o, r] A[r, c, k…]

With groups, in PEFT's form, A still sees every input channel, and each group of outputs sees its own r / groups channels of A:
the update then reaches across groups. Merged, such a convolution runs as one without groups, whose kernel holds the base's along
its diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from twofold.errors import ConfigError
from twofold.functional.widen import in_own_precision
from twofold.layers.dora import DoraLayer
from twofold.layers.linear import LinearShare, effective_bias
from twofold.lowrank.factors import LowRank, merged_weight

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvShare(LinearShare):
    """One adapter's factors over one convolution: A (r, in, *kernel), B (out, r / groups, 1…); and its own bias, if any."""

    def low_rank(self) -> LowRank:
        """Its update of the kernel as a matrix (out, in · kernel), of a convolution without groups."""
        return LowRank(self.A.flatten(1), self.B.flatten(1), self.scale * self.weight_when_active)

    def kernel(self, groups: int) -> Float[Tensor, "out in_ *kernel"]:
        """Its update at the weight it is active with, as the kernel of a convolution without groups."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        inside = self.A.to(dtype).view(groups, -1, self.A[0].numel())
        outside = self.B.to(dtype).view(groups, -1, self.B.shape[1])
        found = torch.bmm(outside, inside) * (self.scale * self.weight_when_active)
        return found.view(len(self.B), *self.A.shape[1:])


class LoraConv(DoraLayer):
    """y = W0 * x + b + Σ weight · scale · B * (A * dropout(x)) over the active shares.

    With DoRA, which has no groups, y = c ⊙ (W0 * x + scale · B * (A * dropout(x))) + b, with c of each output channel.
    """

    base: Conv

    @classmethod
    def from_base(cls, base: nn.Module) -> LoraConv:
        """Wrap a frozen convolution; nothing is copied."""
        return cls(base)

    def matrix(self) -> Float[Tensor, "out in_"]:
        """A row is the kernel of an output channel."""
        return self.weight.flatten(1)

    def _shares_now(self) -> list[ConvShare]:
        return cast(list[ConvShare], self.active())

    def forward(self, x: Tensor) -> Tensor:
        """From ([batch,] in, *space) to ([batch,] out, *space)."""
        shares = self._shares_now()
        if not shares:
            return cast(Tensor, self.base(x))
        if self.merged is not None or self.folding:
            bias = effective_bias(self.bias, shares)
            return self._convolve(x, in_own_precision(self._merged_now, self.weight), bias)
        stretch = self.stretch(shares)
        if stretch is not None:
            return self._stretched(x, shares[0], stretch)
        y: Tensor = self.base(x)
        for share in shares:
            change = share.bias_change
            bias = None if change is None else (change * share.weight_when_active).to(x.dtype)
            y = y + self._update(x, share, bias).to(y.dtype)
        return y

    def _stretched(self, x: Tensor, share: ConvShare, stretch: Tensor) -> Tensor:
        """DoRA's output: all but the bias times the channels' factors."""
        y = self._convolve(x, self.weight, None) + self._update(x, share, None)
        bias = effective_bias(self.bias, [share])
        y = (y * self._channelwise(stretch)).to(x.dtype)
        return y if bias is None else y + self._channelwise(bias)

    def _channelwise(self, values: Float[Tensor, " out"]) -> Tensor:
        return values.view(-1, *(1 for _ in range(self._dimensions)))

    def _update(self, x: Tensor, share: ConvShare, bias: Tensor | None) -> Tensor:
        """What one share adds to the output."""
        h = self._convolve(F.dropout(x, share.dropout, self.training), share.A.to(x.dtype), None)
        B = (share.B * (share.scale * share.weight_when_active)).to(x.dtype)
        return CONVOLVE[self._dimensions](h, B, bias, groups=self.base.groups)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A convolution without groups in the base's geometry."""
        base, convolve = self.base, CONVOLVE[self._dimensions]
        if base.padding_mode == "zeros":
            return convolve(x, weight, bias, base.stride, base.padding, base.dilation)
        x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        return convolve(x, weight, bias, base.stride, 0, base.dilation)

    @property
    def _dimensions(self) -> int:
        return self.weight.dim() - 2

    def delta(self) -> Float[Tensor, "out in_ *kernel"]:
        """The sum of the active updates, in float32 or wider, as a kernel that sees all input channels."""
        shape = (self.base.out_channels, self.base.in_channels, *self.base.kernel_size)
        total = torch.zeros(shape, dtype=torch.float32, device=self.weight.device)
        for share in self._shares_now():
            total = total + share.kernel(self.base.groups)
        stretch = self.stretch(self._shares_now())
        return total if stretch is None else (total + self.weight) * self._channelwise(stretch)[:, None] - self.weight

    @torch.no_grad()
    def fold(self) -> Float[Tensor, "out in_ *kernel"]:
        """A new kernel with the active updates in it, rounded once to the base's type; without groups."""
        return merged_weight(_without_groups(self.weight, self.base.groups), [self.delta()])

    def folded(self) -> dict[str, Tensor]:
        if self.base.groups > 1:
            raise ConfigError(
                f"the update of a convolution with {self.base.groups} groups reaches across its groups, so no weight of its own "
                "can hold it; merge it in memory, where it runs without groups, or leave it out of target_modules"
            )
        bias = effective_bias(self.bias, self._shares_now())
        return {"weight": self.fold()} | ({} if bias is None else {"bias": bias.detach().clone()})


def _without_groups(weight: Float[Tensor, "out part *kernel"], groups: int) -> Float[Tensor, "out in_ *kernel"]:
    """The same map as the kernel of one group: the groups' kernels along the diagonal, zeros elsewhere."""
    if groups == 1:
        return weight
    whole = weight.new_zeros(groups, len(weight) // groups, groups, *weight.shape[1:])
    for group, kernel in enumerate(weight.chunk(groups)):
        whole[group, :, group] = kernel
    return whole.flatten(2, 3).flatten(0, 1)
