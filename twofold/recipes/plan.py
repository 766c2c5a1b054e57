"""`twofold plan`: what a run costs, from a configuration and shapes, without weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.target import find_targets, module_shapes
from twofold.base.blocks import Decoder, describe
from twofold.base.shapes import meta_model
from twofold.planning.memory import StepShape, architecture, plan_memory
from twofold.planning.parameters import plan_parameters


def plan(
    reference: str,
    config: LoraConfig,
    *,
    dtype: torch.dtype,
    sequence_length: int,
    batch_size: int,
    gradient_checkpointing: bool,
    supervised_share: float = 0.5,
) -> dict[str, Any]:
    """Parameters, exact, and memory, estimated, of training an adapter on full sequences.

    Raises:
        TargetError: the adapter's targets match nothing.
        BaseError: no such base.
    """
    model = meta_model(reference)
    shapes = module_shapes(model)
    parameters = plan_parameters(config, shapes, sum(p.numel() for p in model.parameters()))
    tokens = sequence_length * batch_size
    step = StepShape(
        tokens=tokens,
        length=sequence_length,
        supervised_tokens=round(tokens * supervised_share),
        element_bytes=dtype.itemsize,
        recompute=gradient_checkpointing,
    )
    fast = isinstance(describe(model), Decoder)
    ranks = sum(resolve(config, name).r for name in find_targets(config, shapes).adapted)
    memory = plan_memory(parameters, architecture(model.config, fast_path=fast), step, ranks)
    return {
        "base": reference,
        "parameters": {**asdict(parameters), "fraction": parameters.fraction},
        "memory": memory.as_json(),
        "path": "fast" if fast else "plain",
        "adapter_file_bytes": 4 * parameters.trainable,
    }
