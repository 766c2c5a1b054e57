"""Before a run: what will be trained on, token by token, what is cut off, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.target import ModuleShape, find_targets, module_shapes
from twofold.base.batch import Example
from twofold.base.blocks import Decoder, NotDescribed, describe
from twofold.base.load import Base
from twofold.data.batches import steps_per_epoch
from twofold.data.examples import DataReport, Examples
from twofold.planning.memory import MemoryPlan, StepShape, architecture, plan_memory
from twofold.planning.parameters import ParameterPlan, plan_parameters
from twofold.planning.time import product_rate, step_seconds
from twofold.training.optim import TrainingConfig
from twofold.world import ALONE, World


@dataclass(frozen=True)
class Preflight:
    """What a run will do and cost.

    Attributes:
        base: the base's fingerprint.
        path: which path the model trains on, and why.
        seconds: predicted for all steps.
        samples: two examples, token by token, each token with whether it is supervised.
    """

    train: DataReport
    evaluation: DataReport | None
    base: dict[str, Any]
    parameters: ParameterPlan
    memory: MemoryPlan
    path: str
    steps: int
    seconds: float
    samples: list[list[tuple[str, bool]]]
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        return {
            "train": self.train.as_json(),
            "evaluation": self.evaluation.as_json() if self.evaluation else None,
            "base": self.base,
            "parameters": {**asdict(self.parameters), "fraction": self.parameters.fraction},
            "memory": self.memory.as_json(),
            "path": self.path,
            "steps": self.steps,
            "seconds": self.seconds,
            "samples": self.samples,
            "warnings": self.warnings,
        }


def preflight(
    base: Base,
    config: LoraConfig,
    training: TrainingConfig,
    train: Examples,
    evaluation: Examples | None,
    world: World = ALONE,
) -> Preflight:
    """Foresee a run over a base that carries no adapter yet; memory is that of one process.

    Raises:
        TargetError: the adapter's targets match nothing.
    """
    described = describe(base.model)
    fast = isinstance(described, Decoder)
    shapes = module_shapes(base.model)
    parameters = plan_parameters(config, shapes, sum(p.numel() for p in base.model.parameters()))
    sizes = architecture(base.model.config, fast_path=fast)
    micro = micro_step(train, training, base.dtype, world.size)
    whole = step_shape(train, training.batch_size, training, base.dtype)
    steps = total_steps(train, training)
    rate = product_rate(sizes, base.dtype, base.device)
    return Preflight(
        train=train.report,
        evaluation=evaluation.report if evaluation else None,
        base=base.fingerprint.as_json(),
        parameters=parameters,
        memory=plan_memory(parameters, sizes, micro, sum_of_ranks(config, shapes)),
        path="fast path" if not isinstance(described, NotDescribed) else f"plain path: {described.reason}",
        steps=steps,
        seconds=steps * step_seconds(parameters, sizes, whole, rate) / world.size,
        samples=[tokens_shown(base.tokenizer, e) for e in train.items[:2]],
        warnings=warnings(train.report, base),
    )


def total_steps(train: Examples, training: TrainingConfig) -> int:
    """Optimiser steps of a whole run; a stream has no end of its own, and its configuration says how many."""
    steps = training.epochs * steps_per_epoch(len(train.items), training.batch_size)
    return training.max_steps or steps if train.report.streamed else min(steps, training.max_steps or steps)


def micro_step(train: Examples, training: TrainingConfig, dtype: torch.dtype, processes: int) -> StepShape:
    """The largest forward pass: as many of the longest examples as a micro-batch takes."""
    own = -(-training.batch_size // processes)
    size = min(training.micro_batch_size or own, own, len(train.items))
    longest = sorted(train.items, key=lambda e: -len(e.token_ids))[:size]
    return _shape(longest, training, dtype, 1.0)


def step_shape(train: Examples, size: int, training: TrainingConfig, dtype: torch.dtype) -> StepShape:
    """An average optimiser step."""
    return _shape(train.items, training, dtype, min(1.0, size / len(train.items)))


def _shape(examples: Sequence[Example], training: TrainingConfig, dtype: torch.dtype, share: float) -> StepShape:
    return StepShape(
        tokens=round(share * sum(len(e.token_ids) for e in examples)),
        length=max(len(e.token_ids) for e in examples),
        supervised_tokens=round(share * sum(e.supervised_tokens for e in examples)),
        element_bytes=dtype.itemsize,
        recompute=training.gradient_checkpointing,
    )


def sum_of_ranks(config: LoraConfig, shapes: dict[str, ModuleShape]) -> int:
    return sum(resolve(config, name).r for name in find_targets(config, shapes).adapted)


def tokens_shown(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """Each token's text, and whether it is supervised."""
    texts = [tokenizer.decode([t]) for t in example.token_ids]
    return list(zip(texts, example.supervised, strict=True))


def warnings(report: DataReport, base: Base) -> list[str]:
    """What a user may want to change before starting."""
    found = []
    if report.streamed:
        found.append(f"the data is streamed, so this is an account of its first {report.examples} examples only")
    if report.too_long:
        found.append(
            f"{report.too_long} examples are over data.max_length; {report.lost_supervised_tokens} supervised tokens are lost"
        )
    if report.unsupervised:
        found.append(f"{report.unsupervised} examples are left out because nothing in them is supervised")
    if report.format != "text" and base.renderer.template is not None and not base.renderer.ends_turns:
        found.append("the chat template puts no end token after an answer, so generation will not know where to stop")
    if "strftime_now" in (base.renderer.template or ""):
        found.append(
            "the chat template prints today's date, so other days give other tokens; fix the date in data.template"
        )
    return found
