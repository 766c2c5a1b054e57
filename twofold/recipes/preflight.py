"""Before a run: what will be trained on, token by token, what is cut off, and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from twofold.adapter.config import LoraConfig
from twofold.adapter.shapes import module_shapes
from twofold.base.batch import Example, PackedBatch, pack
from twofold.base.blocks import Decoder, NotDescribed, describe
from twofold.base.load import Base
from twofold.data.batches import micro_batches, step_indices, steps_per_epoch
from twofold.data.examples import DataReport, Examples
from twofold.events import Event
from twofold.layers.quantised import packed_as, values_of
from twofold.native.training import why_not
from twofold.planning.advice import far_off
from twofold.planning.architecture import StepShape, architecture
from twofold.planning.memory import FAST, PLAIN, PLAIN_FULL, Loop, MemoryPlan, Setup, plan_memory
from twofold.planning.parameters import ParameterPlan, plan_full, plan_parameters
from twofold.planning.time import measure_rates, plan_time
from twofold.recipes.full import WHY
from twofold.training.layout import lay_out
from twofold.training.optim import TrainingConfig
from twofold.world import ALONE, World

SHAPE_STEPS = 64
"""Steps that are looked through for their numbers of rows."""


@dataclass(frozen=True)
class Preflight:
    """What a run will do and cost.

    Attributes:
        base: the base's fingerprint.
        path: which path the model trains on, and why.
        seconds: predicted for all steps.
        tokens, rows: of the first step, and how many of them are computed: what examples begin with alike once, and nothing
            behind the last prediction.
        remembered: bytes of the states that `training.cache_frozen` keeps, at most; 0 on the plain path, which keeps none.
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
    tokens: int
    rows: int
    remembered: int
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
            "first_step": {"tokens": self.tokens, "rows": self.rows},
            "remembered_bytes": self.remembered,
            "samples": self.samples,
            "warnings": self.warnings,
        }


@dataclass(frozen=True, kw_only=True)
class Prepared(Event):
    """Everything is loaded and foreseen; training comes next."""

    preflight: Preflight

    def record(self) -> dict[str, Any]:
        return {"event": "prepared", "steps": self.preflight.steps, "seconds": self.preflight.seconds}


def preflight(
    base: Base,
    config: LoraConfig | None,
    training: TrainingConfig,
    train: Examples,
    evaluation: Examples | None,
    held: int,
    world: World = ALONE,
) -> Preflight:
    """Foresee a run over a base that carries no adapter yet; memory is that of one process.

    Args:
        config: the adapter; None where the base learns itself.
        held: bytes that this process held before the base was loaded: interpreter and libraries.

    Raises:
        TargetError: the adapter's targets match nothing.
        ConfigError: a variant or a start is asked of a module that it is not defined for.
    """
    described = WHY if config is None else describe(base.model)
    shapes, values = module_shapes(base.model), values_of(base.model)
    parameters = plan_full(shapes, values) if config is None else plan_parameters(config, shapes, values)
    sizes = architecture(base.model)
    loop = PLAIN_FULL if config is None else FAST if isinstance(described, Decoder) else PLAIN
    scheme = packed_as(base.model)
    packed = "none" if scheme is None else scheme.kind
    setup = Setup(
        loop=loop,
        method="full" if config is None else "lora",
        quantization=packed,
        device=base.device.type,
        held=held,
        shapes=numbers_of_rows(train, training, base.dtype, loop),
        kernels=loop is FAST and not training.compile and why_not(base.dtype, base.device) is None,
    )
    batch = first_batch(train, training)
    first = _shape(batch, training, base.dtype, loop)
    of_first = plan_memory(parameters, sizes, first, setup)
    rates = measure_rates(sizes, base.dtype, base.device, kernels=setup.kernels)
    seconds = plan_time(of_first, first, setup.method, rates).seconds
    steps = total_steps(train, training)
    return Preflight(
        train=train.report,
        evaluation=evaluation.report if evaluation else None,
        base=base.fingerprint.as_json(),
        parameters=parameters,
        memory=plan_memory(parameters, sizes, micro_step(train, training, base.dtype, loop, world.size), setup),
        path=_path(described, base, training),
        steps=steps,
        seconds=steps * seconds / world.size,
        tokens=batch.tokens,
        rows=lay_out(batch, share=training.share_prefixes).computed if loop is FAST else batch.tokens,
        remembered=remembered_bytes(train, evaluation, sizes.hidden * base.dtype.itemsize)
        if training.cache_frozen and loop is FAST
        else 0,
        samples=[example_shown(base, e) for e in train.items[:2]],
        warnings=[
            *warnings(train.report, base),
            *_forgotten(training, described),
            *(far_off(training.learning_rate, config, sizes.hidden) if config else []),
        ],
    )


def total_steps(train: Examples, training: TrainingConfig) -> int:
    """Optimiser steps of a whole run; a stream has no end of its own, and its configuration says how many."""
    steps = training.epochs * steps_per_epoch(len(train.items), training.batch_size)
    return training.max_steps or steps if train.report.streamed else min(steps, training.max_steps or steps)


def micro_step(train: Examples, training: TrainingConfig, dtype: torch.dtype, loop: Loop, processes: int) -> StepShape:
    """The largest forward pass that may occur: of a process's share of a step over the longest examples."""
    own = -(-training.batch_size // processes)
    longest = sorted(train.items, key=lambda e: -len(e.token_ids))[:own]
    passes = micro_batches(longest, training.micro_batch_size, training.micro_batch_tokens)
    return _shape(max(passes, key=lambda b: b.tokens), training, dtype, loop)


def first_batch(train: Examples, training: TrainingConfig) -> PackedBatch:
    """The first optimiser step, which stands for all."""
    return pack(_examples_of(train, training, 0))


def _examples_of(train: Examples, training: TrainingConfig, step: int) -> list[Example]:
    return [train.items[i] for i in step_indices(len(train.items), training.batch_size, training.seed, step)]


def numbers_of_rows(train: Examples, training: TrainingConfig, dtype: torch.dtype, loop: Loop) -> int:
    """How many different numbers of rows the first steps compute."""
    steps = min(SHAPE_STEPS, total_steps(train, training))
    passes = [
        batch
        for step in range(steps)
        for batch in micro_batches(
            _examples_of(train, training, step), training.micro_batch_size, training.micro_batch_tokens
        )
    ]
    return len({_shape(b, training, dtype, loop).tokens for b in passes})


def remembered_bytes(train: Examples, evaluation: Examples | None, bytes_per_token: int) -> int:
    """One state for every token of the data."""
    return bytes_per_token * (train.report.tokens + (evaluation.report.tokens if evaluation else 0))


def _forgotten(training: TrainingConfig, described: Decoder | NotDescribed) -> list[str]:
    """Is something to be remembered on a path that remembers nothing?"""
    if not training.cache_frozen or isinstance(described, Decoder):
        return []
    return [f"training.cache_frozen has no effect: only the fast path remembers states, and {described.reason}"]


def _path(described: Decoder | NotDescribed, base: Base, training: TrainingConfig) -> str:
    """Which code a step runs on, and why not on faster one."""
    if isinstance(described, NotDescribed):
        return f"plain path: {described.reason}"
    if training.compile:
        return "fast path, on kernels by torch.compile"
    slower = why_not(base.dtype, base.device)
    return (
        "fast path, on kernels of Twofold's own"
        if slower is None
        else f"fast path, on PyTorch's own operations ({slower})"
    )


def _shape(batch: PackedBatch, training: TrainingConfig, dtype: torch.dtype, loop: Loop) -> StepShape:
    """The rows that are computed: all, padded, or on the fast path shared prefixes once and nothing behind the last prediction."""
    padded = len(batch.lengths) * max(batch.lengths)
    return StepShape(
        tokens=lay_out(batch, share=training.share_prefixes).rows if loop is FAST else padded,
        length=max(batch.lengths),
        supervised_tokens=batch.supervised_tokens,
        element_bytes=dtype.itemsize,
        recompute=training.gradient_checkpointing,
    )


def example_shown(base: Base, example: Example) -> list[tuple[str, bool]]:
    """An example's tokens, and its class behind them, if it has one."""
    label = [] if example.label is None else [(f" → {base.model.config.id2label[example.label]}", True)]
    return [*tokens_shown(base.tokenizer, example), *label]


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
