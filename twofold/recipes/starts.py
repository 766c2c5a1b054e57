"""The starts that need more than the base: its inputs on first examples (EVA), their gradient (LoRA-GA), or the weights that a
4-bit base was made from (LoftQ). Factors come back, for `attach(..., factors=...)`; the base is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.shapes import ModuleShape, module_shapes
from twofold.adapter.target import find_targets
from twofold.adapter.variants import check_variants
from twofold.base.batch import Example, pack
from twofold.base.blocks import NotDescribed
from twofold.base.load import locate
from twofold.base.quantised import read_again
from twofold.errors import ConfigError
from twofold.layers.quantised import frozen_of, packed_as
from twofold.lowrank.init import Factors
from twofold.lowrank.spectral_init import eva, eva_ranks, loftq, lora_ga
from twofold.quant import Scheme
from twofold.training.objective import plain_objective

START_EXAMPLES = 16
"""Examples, one after the other, from which a start is computed."""


def started(
    model: Any, config: LoraConfig, examples: Sequence[Example], pad_id: int, source: str
) -> tuple[LoraConfig, dict[str, Factors] | None]:
    """The config and the factors to attach: of EVA with its ranks redistributed, None where `attach` itself knows the start.

    Args:
        source: the reference of the base that `model` was read from.

    Raises:
        ConfigError: the start needs what this base does not have.
    """
    check_start(model, config, source)
    if config.init_lora_weights == "eva":
        return eva_start(model, config, examples[:START_EXAMPLES], pad_id)
    if config.init_lora_weights == "lora_ga":
        return config, lora_ga_start(model, config, examples[:START_EXAMPLES], pad_id)
    if config.init_lora_weights == "loftq":
        return config, loftq_from_source(model, config, source)
    return config, None


def check_start(model: Any, config: LoraConfig, source: str) -> None:
    """Refuse a start that cannot be computed over this base, before anything is.

    Raises:
        ConfigError: LoRA-GA over packed weights, which have no gradient; LoftQ where packing lost nothing, or where what it lost
            is not there.
    """
    start = config.init_lora_weights
    if start == "lora_ga" and any(frozen_of(m) is not None for m in model.modules()):
        raise ConfigError(
            "init_lora_weights: lora_ga starts from the gradient of the weights, which packed ones do not have; take loftq, eva or "
            "pissa, or leave out quantization"
        )
    if start == "loftq" and packed_as(model) is None:
        raise ConfigError(
            "init_lora_weights: loftq starts from what quantisation rounds away, and this base is not quantised; set quantization: "
            "nf4, or take pissa"
        )
    if start == "loftq" and getattr(model.config, "quantization_config", None) is not None:
        raise ConfigError(
            f"init_lora_weights: loftq needs the 16-bit weights, and {source} holds packed ones; name the 16-bit base with "
            "quantization: nf4"
        )


def _targets(model: nn.Module, config: LoraConfig) -> dict[str, ModuleShape]:
    targets = find_targets(config, module_shapes(model))
    check_variants(config, targets)
    return targets.adapted


def eva_start(
    model: Any, config: LoraConfig, examples: Sequence[Example], pad_id: int
) -> tuple[LoraConfig, dict[str, Factors]]:
    """EVA (arXiv 2410.07170): A along the main directions of each module's inputs, ranks where they explain most."""
    adapted = _targets(model, config)
    moments = _input_moments(model, adapted, examples, pad_id)
    explained = {n: _explained(moments[n]) for n in adapted}
    ranks = eva_ranks(explained, {n: resolve(config, n).r for n in adapted})
    factors = {n: eva(moments[n], ranks[n], s.out_features) for n, s in adapted.items()}
    return replace(config, rank_pattern={f"^{n.replace('.', '[.]')}": r for n, r in ranks.items()}), factors


def _explained(moments: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(moments).flip(0).clamp_min(0)
    return values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)


@torch.no_grad()
def _input_moments(
    model: Any, adapted: Mapping[str, ModuleShape], examples: Sequence[Example], pad_id: int
) -> dict[str, Tensor]:
    """Σ x xᵀ over the rows of each module's input; modules that read the same input share one."""
    moments: dict[str, Tensor] = {}
    last: list[tuple[Tensor, Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if last and last[0][0] is inputs[0]:
                moments[name] = last[0][1]
                return
            rows = inputs[0].flatten(0, -2).float()
            found = moments[name] if name in moments else rows.new_zeros(rows.shape[1], rows.shape[1])
            moments[name] = found.addmm_(rows.T, rows)
            last[:] = [(inputs[0], moments[name])]

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(note(n)) for n in adapted]
    try:
        objective = plain_objective(model, pad_id, NotDescribed("inputs are looked at"), recompute=False)
        for example in examples:
            objective(pack([example]))
    finally:
        for handle in handles:
            handle.remove()
    return moments


def lora_ga_start(model: Any, config: LoraConfig, examples: Sequence[Example], pad_id: int) -> dict[str, Factors]:
    """LoRA-GA (arXiv 2407.05000): factors along the gradient of the weights themselves, which takes memory for all of them."""
    adapted = _targets(model, config)
    objective = plain_objective(model, pad_id, NotDescribed("weights get gradients"), recompute=False)
    weights = {n: cast(nn.Parameter, model.get_submodule(n).weight) for n in adapted}
    with _learning(model, list(weights.values())):
        for example in examples:
            batch = pack([example])
            if batch.supervised_tokens:
                objective(batch).loss_sum.backward()
        found = {}
        for name in adapted:
            gradient = weights[name].grad
            if gradient is None:
                raise ConfigError(
                    f"the loss of the first examples does not depend on '{name}', so lora_ga finds no gradient"
                )
            upright = gradient.T if isinstance(model.get_submodule(name), Conv1D) else gradient
            r, _, scale = resolve(config, name)
            found[name] = lora_ga(upright, r, scale)
    return found


@contextmanager
def _learning(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, these weights alone get gradients; after it they have none, and learn as they did."""
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, learns in before.items():
            parameter.requires_grad_(learns)
            parameter.grad = None


def loftq_start(
    model: nn.Module, config: LoraConfig, weights: Mapping[str, Tensor], roundtrip: Callable[[Tensor], Tensor]
) -> dict[str, Factors]:
    """LoftQ (arXiv 2310.08659) with one iteration, for which the base stays as it was quantised.

    Args:
        weights: the unquantised (out, in) of each adapted module.
        roundtrip: quantises and dequantises a weight as the base's own quantisation does.
    """
    return {
        name: loftq(weights[name], roundtrip, *_rank_and_scale(config, name))[0] for name in _targets(model, config)
    }


def loftq_from_source(model: Any, config: LoraConfig, source: str) -> dict[str, Factors]:
    """LoftQ over a base that was packed while it was read; its 16-bit weights are read again from its checkpoint, one at a time.

    Args:
        source: the reference that the base was loaded by.
    """
    adapted, found = _targets(model, config), dict[str, Factors]()

    def look(name: str, weight: Tensor) -> None:
        packed = frozen_of(model.get_submodule(name)) if name in adapted else None
        if packed is not None:
            left = packed.dequantised()
            found[name], _ = loftq(weight, lambda _: left, *_rank_and_scale(config, name))

    read_again(model, locate(source), cast(Scheme, packed_as(model)), look)
    if missing := [name for name in adapted if name not in found]:
        raise ConfigError(
            f"init_lora_weights: loftq is for quantised layers, and '{missing[0]}' stays as it is; exclude it"
        )
    return found


def _rank_and_scale(config: LoraConfig, module: str) -> tuple[int, float]:
    found = resolve(config, module)
    return found.r, found.scale
