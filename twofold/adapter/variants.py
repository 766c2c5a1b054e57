"""The share that a config puts on one linear map: its start, and what its variant of LoRA adds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.shapes import ModuleShape
from twofold.adapter.target import Targets
from twofold.errors import AdapterFileError, ConfigError
from twofold.layers.dora import MatrixShare
from twofold.layers.linear import LinearShare
from twofold.layers.protocol import bare_modules
from twofold.layers.quantised import frozen_of
from twofold.lowrank.dora import row_norms, row_squares
from twofold.lowrank.init import STARTS, Factors
from twofold.lowrank.spectral_init import DATA_STARTS, directions, is_subtracted, weight_start

LINEAR = ("linear", "conv1d")
DORA = (*LINEAR, "embedding", "convolution")


def check_variants(config: LoraConfig, targets: Targets) -> None:
    """Refuse what a variant or a start cannot do for the modules and parameters that it is asked for.

    Raises:
        ConfigError: names the setting and the modules.
    """
    parameters = [f"{name}.{shape.name}" for name, found in targets.parameters.items() for shape in found]
    asked = linear_only(config)
    others = [name for name, shape in targets.adapted.items() if shape.kind not in LINEAR] + parameters
    if asked and others:
        raise ConfigError(
            f"{' and '.join(asked)} is defined for linear layers alone, but the targets include {_listed(others)}; "
            "leave these out by exclude_modules, or take plain LoRA"
        )
    beyond = [
        name for name, shape in targets.adapted.items() if shape.kind not in DORA or shape.groups > 1
    ] + parameters
    if config.use_dora and beyond:
        raise ConfigError(
            "use_dora is defined for linear layers, embeddings and convolutions without groups, but the targets include "
            f"{_listed(beyond)}; leave these out by exclude_modules, or take plain LoRA"
        )
    for name, shape in targets.adapted.items():
        r, most = resolve(config, name).r, min(shape.in_features, shape.out_features)
        taken = directions(config.init_lora_weights, r)
        if taken > most:
            twice = f" (2 r, and r is {r})" if taken > r else ""
            raise ConfigError(
                f"init_lora_weights: {config.init_lora_weights} takes {taken} directions{twice} out of '{name}', which has but "
                f"{most}; choose a lower r, by rank_pattern for this module alone, or another init_lora_weights"
            )


def check_given(config: LoraConfig, targets: Targets, given: Mapping[str, Factors] | None) -> None:
    """Refuse a start that is computed before where it is not given.

    Raises:
        ConfigError: names the start and the modules.
    """
    missing = [name for name in targets.adapted if name not in (given or {})]
    if config.init_lora_weights in DATA_STARTS and missing:
        raise ConfigError(
            f"init_lora_weights: {config.init_lora_weights} is computed from data or from the unquantised weights before "
            f"training, but no factors were given for {_listed(missing)}; see twofold.recipes.starts"
        )


def check_source(model: nn.Module, config: LoraConfig, targets: Targets, path: Path) -> None:
    """Refuse to compute the start of a file's raw factors again from packed weights: it was that of the 16-bit ones.

    Raises:
        AdapterFileError: names the file and a packed module.
    """
    bases = dict(bare_modules(model)) if is_subtracted(config.init_lora_weights) else {}
    held = {name: getattr(bases[name], "base", bases[name]) for name in targets.adapted if name in bases}
    packed = [name for name, base in held.items() if frozen_of(base) is not None]
    if packed:
        raise AdapterFileError(
            f"{path} holds raw factors of init_lora_weights={config.init_lora_weights!r}, whose start was read off the 16-bit "
            f"weight of '{packed[0]}', which is quantised here; load it onto its 16-bit base and save it again "
            "(twofold.save_adapter): that writes the plain update"
        )


def linear_only(config: LoraConfig) -> list[str]:
    """The settings that only linear layers know."""
    flags = [name for name in ("lora_bias", "freeze_a") if getattr(config, name)]
    drawn = config.init_lora_weights is True or config.init_lora_weights == "gaussian"
    return flags if drawn else [*flags, f"init_lora_weights: {str(config.init_lora_weights).lower()}"]


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{n}'" for n in names[:4]) + (", ..." if len(names) > 4 else "")


def linear_share(
    config: LoraConfig, module: str, shape: ModuleShape, base: nn.Module, given: Mapping[str, Factors] | None = None
) -> LinearShare:
    """A fresh share of a linear module, on its device, in float32 or the base's wider type.

    Args:
        given: factors to start from, by module, in place of those that the config would draw.

    Raises:
        ConfigError: the start or the variant cannot be had from this module; names it.
    """
    r, _, scale = resolve(config, module)
    try:
        start = _own(given[module]) if given and module in given else _start(config, shape, base, r, scale)
        factors = like(cast(Tensor, base.weight), start)
    except ConfigError as error:
        raise ConfigError(f"'{module}': {error}") from error
    trained = shape.bias and config.bias != "none"
    share = LinearShare(factors, scale, config.lora_dropout, torch.zeros_like(factors[1][:, 0]) if trained else None)
    if is_subtracted(config.init_lora_weights):
        share.count_from_start()
    if config.freeze_a:
        share.freeze_A()
    if config.lora_bias:
        share.b_bias = nn.Parameter(torch.zeros_like(factors[1][:, 0]))
    if config.use_dora:
        set_lengths(share, _matrix(base))
    return share


def _own(given: Factors) -> Factors:
    """A copy of factors that belong to someone else; one value that is repeated needs none."""
    A, B = (f if 0 in f.stride() else f.clone() for f in given)
    return A, B


def set_lengths(share: MatrixShare, matrix: Float[Tensor, "out in_"]) -> None:
    """Make a share DoRA's, with the lengths of the rows of this base and its start for its magnitudes, in its type."""
    share.weight_when_active = 1.0
    share.magnitude = nn.Parameter(row_norms(matrix, row_squares(matrix), share.low_rank()))
    share.weight_when_active = 0.0


def _start(config: LoraConfig, shape: ModuleShape, base: nn.Module, r: int, scale: float) -> Factors:
    from_weight = weight_start(config.init_lora_weights)
    if from_weight is None:
        return STARTS[config.init_lora_weights](r, shape.in_features, shape.out_features)
    return from_weight(_matrix(base), r, scale)


def _matrix(base: nn.Module) -> Tensor:
    """The base's weight as (out, in), of a packed one what its codes stand for.

    Raises:
        ConfigError: it is packed in a way of its own, so that its values cannot be read.
    """
    packed = frozen_of(base)
    if packed is not None:
        return packed.dequantised()
    weight = cast(Tensor, base.weight).detach()
    if not weight.is_floating_point():
        raise ConfigError(
            f"its weight is packed ({weight.dtype}), and DoRA and starts from the weight need its values; load the base "
            "without quantisation, or take plain LoRA"
        )
    return weight.T if isinstance(base, Conv1D) else weight


def like(weight: Tensor, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors on a weight's device, in float32 or the weight's wider type, their rows one after the other in memory: fused
    AdamW goes through a parameter and its moments as they lie, and those of a checkpoint lie so."""
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
    a, b = (_laid_out(f.detach().to(weight.device, dtype)) for f in factors)
    return a, b


def _laid_out(factor: Tensor) -> Tensor:
    """Row by row in memory that holds nothing else; one value that is repeated without memory of its own stays so."""
    alone = factor.is_contiguous() and factor.untyped_storage().nbytes() == factor.nbytes
    return factor if alone or 0 in factor.stride() else factor.clone(memory_format=torch.contiguous_format)
