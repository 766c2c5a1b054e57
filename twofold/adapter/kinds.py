"""From the kind of a module to the layer that goes around it and the share that an adapter gets of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.names import parents
from twofold.adapter.shapes import Kind, ModuleShape
from twofold.adapter.target import Targets
from twofold.adapter.variants import LINEAR, like, linear_share, set_lengths
from twofold.errors import ConfigError
from twofold.layers.attention import AttentionShare, LoraAttention
from twofold.layers.conv import ConvShare, LoraConv
from twofold.layers.embedding import EmbeddingShare, LoraEmbedding
from twofold.layers.experts import LoraParameters, ParameterFactors, ParametersShare
from twofold.layers.linear import LinearShare, LoraLinear
from twofold.layers.protocol import AdapterLayer, Share, bias_of
from twofold.layers.saved import BiasShare, CopyShare, TrainedBias, TrainedCopy
from twofold.layers.tokens import TiedTokens, TokensShare, TrainedTokens
from twofold.lowrank.init import STARTS, Factors, embedding


class LayerKind(NamedTuple):
    """How modules of a kind are adapted: `share` gets the config, the module's name, its shape and the frozen module."""

    wrap: Callable[[nn.Module], AdapterLayer]
    share: Callable[[LoraConfig, str, ModuleShape, nn.Module], Share]


def _bias_change(config: LoraConfig, shape: ModuleShape, b: Tensor) -> Tensor | None:
    return b.new_zeros(len(b)) if shape.bias and config.bias != "none" else None


def embedding_share(config: LoraConfig, module: str, shape: ModuleShape, base: nn.Module) -> EmbeddingShare:
    r, _, scale = resolve(config, module)
    share = EmbeddingShare(like(_weight(base), embedding(r, shape.in_features, shape.out_features)), scale)
    if config.use_dora:
        set_lengths(share, _weight(base).T)
    return share


def conv_share(config: LoraConfig, module: str, shape: ModuleShape, base: nn.Module) -> ConvShare:
    """The start is that of a linear map from the window that the kernel sees; B takes r / groups of A's channels."""
    r, _, scale = resolve(config, module)
    if r % shape.groups:
        raise ConfigError(
            f"'{module}' is a convolution with {shape.groups} groups, of which r = {r} is no multiple; "
            "give it such a rank in rank_pattern, or leave it out with exclude_modules"
        )
    weight = _weight(base)
    a, b = like(weight, STARTS[config.init_lora_weights](r, shape.in_features, shape.out_features))
    kernel = weight.shape[2:]
    factors = a.view(r, -1, *kernel), b[:, : r // shape.groups].reshape(len(b), -1, *(1 for _ in kernel))
    share = ConvShare(factors, scale, config.lora_dropout, _bias_change(config, shape, b))
    if config.use_dora:
        set_lengths(share, weight.flatten(1))
        share.magnitude = nn.Parameter(cast(Tensor, share.magnitude).detach().view(1, -1, *(1 for _ in kernel)))
    return share


def attention_share(config: LoraConfig, module: str, shape: ModuleShape, base: nn.Module) -> AttentionShare:
    """Both projections, each with the rank and the start of a linear map."""
    r, _, scale = resolve(config, module)
    d, weight = shape.in_features, cast(nn.MultiheadAttention, base).in_proj_weight
    into, out = (like(weight, STARTS[config.init_lora_weights](r, d, width)) for width in (shape.out_features, d))
    return AttentionShare(*(LinearShare(factors, scale, config.lora_dropout) for factors in (into, out)))


def _weight(base: nn.Module) -> Tensor:
    return cast(Tensor, base.weight)


KINDS: dict[Kind, LayerKind] = {
    "linear": LayerKind(LoraLinear.from_base, linear_share),
    "conv1d": LayerKind(LoraLinear.from_base, linear_share),
    "embedding": LayerKind(LoraEmbedding.from_base, embedding_share),
    "convolution": LayerKind(LoraConv.from_base, conv_share),
    "attention": LayerKind(LoraAttention.from_base, attention_share),
}
"""Every kind of module that gets factors; the others are adapted not at all, or trained whole."""


class Part(NamedTuple):
    """What an adapter puts on one module: the layer around it, and its share of that layer."""

    module: str
    wrap: Callable[[nn.Module], AdapterLayer]
    make: Callable[[nn.Module], Share]


def parts_of(config: LoraConfig, targets: Targets, given: Mapping[str, Factors] | None = None) -> list[Part]:
    """Everything that an adapter of these settings puts on these targets, to be made in this order.

    Args:
        given: factors to start from, by module, in place of those that the config would draw; of linear modules.

    Raises:
        ConfigError: two of them would fall on one module, or one inside another's, so that one would be lost.
    """
    shares = {kind: KINDS[kind].share for kind in KINDS} | dict.fromkeys(LINEAR, partial(linear_share, given=given))
    adapted = [
        Part(module, KINDS[shape.kind].wrap, partial(shares[shape.kind], config, module, shape))
        for module, shape in targets.adapted.items()
    ]
    saved = [Part(module, TrainedCopy.from_base, CopyShare) for module in targets.saved]
    parameters = [
        Part(module, LoraParameters.from_base, partial(parameters_share, config, targets, module))
        for module in targets.parameters
    ]
    others = [*adapted, *parameters, *saved, *_token_parts(targets)]
    taken = {part.module for part in others}
    return _apart(others + [Part(m, TrainedBias.from_base, _bias_share) for m in targets.biased if m not in taken])


def _apart(parts: list[Part]) -> list[Part]:
    taken = Counter(part.module for part in parts)
    for module, times in taken.items():
        if clash := next((m for m in parents(module) if m in taken and (m != module or times > 1)), None):
            raise ConfigError(
                f"this adapter changes '{module}' in one way and '{clash}' in another, and both cannot be"
            )
    return parts


def parameters_share(config: LoraConfig, targets: Targets, module: str, base: nn.Module) -> ParametersShare:
    """Every expert starts as a linear map of its own would; ranks and scales go by the parameters' names."""
    factors, scales = {}, {}
    for shape in targets.parameters[module]:
        r, _, scales[shape.name] = resolve(config, f"{module}.{shape.name}")
        start = STARTS[config.init_lora_weights]
        starts = [start(r, shape.in_features, shape.out_features) for _ in range(shape.experts)]
        stacked = torch.stack([a for a, _ in starts]), torch.stack([b for _, b in starts])
        factors[shape.name] = ParameterFactors(*like(base.get_parameter(shape.name), stacked), shape.transposed)
    return ParametersShare(factors, scales, _learned_bias(targets, module, base))


def _bias_share(base: nn.Module) -> Share:
    return BiasShare(bias_of(base))


def _learned_bias(targets: Targets, module: str, base: nn.Module) -> Tensor | None:
    return bias_of(base) if module in targets.biased else None


def _token_parts(targets: Targets) -> list[Part]:
    made: dict[str, TokensShare] = {}

    def make(module: str, base: nn.Module) -> Share:
        made[module] = TokensShare(targets.tokens[module], _weight(base), _learned_bias(targets, module, base))
        return made[module]

    def follow(module: str, base: nn.Module) -> Share:
        return TiedTokens(made[targets.tied[module]], _learned_bias(targets, module, base))

    own = [Part(m, TrainedTokens.from_base, partial(make, m)) for m in targets.tokens if m not in targets.tied]
    return own + [Part(m, TrainedTokens.from_base, partial(follow, m)) for m in targets.tied]
