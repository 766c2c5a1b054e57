"""What a training starts from: the base, the data and the pre-flight, on every process that takes part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from twofold.adapter.config import LoraConfig
from twofold.adapter.files import open_adapter
from twofold.base.load import Base, load_base, locate, renderer_for
from twofold.base.sharded import bytes_per_process, load_sharded, local_parts
from twofold.data.examples import Examples
from twofold.data.stream import Streamed, first_examples, open_stream
from twofold.errors import DataError
from twofold.events import Emit
from twofold.machine import checked_device, memory_bytes
from twofold.recipes.adapters import check_base
from twofold.recipes.preflight import Preflight, preflight
from twofold.recipes.settings import TrainConfig, check_factors_only
from twofold.recipes.starts import check_start
from twofold.recipes.tasks import TASKS
from twofold.world import World


@dataclass(frozen=True)
class Loaded:
    """`train` is the whole training data, or what `stream` begins with; `held` the bytes that this process held before it all;
    `lora` the adapter to train, None where the base learns itself."""

    base: Base
    train: Examples
    evaluation: Examples | None
    lora: LoraConfig | None
    stream: Streamed | None
    held: int


def is_sharded(config: TrainConfig, world: World) -> bool:
    """Whether the base is spread over the processes of this training."""
    return config.training.parallel == "shard" and world.size > 1


def load(config: TrainConfig, emit: Emit, world: World) -> Loaded:
    """The base and the data of a configuration; a mistake that one process meets is raised in all.

    Raises:
        UserError: anything about the configuration, the base or the data.
    """
    held = memory_bytes(torch.device("cpu"))
    base = _load_base(config, emit, world)
    return world.together(lambda: _load_data(config, base, held, emit, sharded=is_sharded(config, world)))


def _load_base(config: TrainConfig, emit: Emit, world: World) -> Base:
    world.together(lambda: world.checked_device(checked_device(config.device), config.device))
    if world.size > 1:  # one process of a machine fills its cache, and the others find it full
        world.together(lambda: locate(config.base, emit) if world.local_rank == 0 else None)
    if is_sharded(config, world):
        return load_sharded(config.base, config.dtype, config.device, world, emit)
    head = world.together(lambda: TASKS[config.task].head(config))
    return world.together(lambda: load_base(config.base, config.dtype, config.device, emit, config.scheme, head))


def _load_data(config: TrainConfig, base: Base, held: int, emit: Emit, *, sharded: bool) -> Loaded:
    task = TASKS[config.task]
    lora = None if config.full else task.adapter(config.adapter.lora(), base)
    if config.adapter.init_from:
        files = open_adapter(Path(config.adapter.init_from))
        check_base(files, base.fingerprint, emit, allow_foreign=config.allow_foreign_base)
        task.check_continues(files, base)
    if sharded and lora is not None:
        check_factors_only(lora)
    template, data, training = config.data.chat_template(), task.limited(config.data, base, emit), config.training
    if template is not None:
        base = replace(base, renderer=renderer_for(base.model, base.tokenizer, template))
    stream = open_stream(data, base.renderer, training.batch_size, training.seed) if data.streaming else None
    train_set = first_examples(stream, emit) if stream else task.examples(data.train, data, base, emit)
    held_out = task.examples(data.evaluation, data, base, emit) if data.evaluation else None
    return Loaded(base, train_set, held_out, lora, stream, held)


def foresee(config: TrainConfig, loaded: Loaded, world: World) -> Preflight:
    """The pre-flight, with the memory of one process of those that train.

    Raises:
        TargetError: the adapter's targets match nothing.
        ConfigError: a variant or a start is asked of what it is not defined for.
    """
    if loaded.lora is not None:
        check_start(loaded.base.model, loaded.lora, loaded.base.reference)
    data = (loaded.train, loaded.evaluation)
    found = preflight(loaded.base, loaded.lora, config.training, *data, loaded.held, world)
    if not is_sharded(config, world):
        return found
    weights = bytes_per_process(loaded.base.model, world.size)
    return replace(found, memory=replace(found.memory, terms={**found.memory.terms, "weights": weights}))


def check_alike(foreseen: Preflight, world: World) -> None:
    """Raises DataError unless all processes read the same base and data, which may lie on different machines."""
    kinds = ("train", "evaluation", "base")
    said = foreseen.as_json()
    for rank, other in enumerate(world.gather([said[k] for k in kinds])):
        differing = [k for k, value in zip(kinds, other, strict=True) if value != said[k]]
        if differing:
            raise DataError(
                f"processes {world.rank} and {rank} of this training read different things under the same name "
                f"({', '.join(differing)}); give every machine the same files"
            )


def own_tensors(config: TrainConfig, base: Base, world: World) -> nn.Module:
    """What this process holds of the base: all of it, or its parts."""
    return local_parts(base.model) if is_sharded(config, world) else cast(nn.Module, base.model)
