"""`twofold plan`: what a run costs, from a configuration and shapes, without weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from twofold.adapter.config import LoraConfig, check_volume
from twofold.adapter.shapes import ModuleShape, module_shapes
from twofold.base.blocks import Decoder, describe
from twofold.base.load import DEFAULT_BASE
from twofold.base.shapes import meta_model
from twofold.errors import ConfigError
from twofold.machine import memory_bytes, memory_capacity, pick_device
from twofold.native.training import why_not
from twofold.planning import advice
from twofold.planning.architecture import Architecture, StepShape, architecture
from twofold.planning.memory import (
    FAST,
    PLAIN,
    STOCK,
    STOCK_FULL,
    Loop,
    MemoryPlan,
    Quantization,
    Setup,
    plan_memory,
    plan_sharded,
)
from twofold.planning.memory import Method as Trained
from twofold.planning.parameters import ParameterPlan, plan_parameters
from twofold.planning.time import TimePlan, measure_rates, plan_time

Method = Literal["lora", "qlora", "full"]
HELD_BYTES = memory_bytes(torch.device("cpu"))
"""What this process held when this file was imported, which is before a base is loaded: interpreter and libraries."""
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(LoraConfig):
    """The training whose cost is asked for: an adapter's settings, and how it is trained.

    Attributes:
        base: a Hugging Face directory, a hub id, a `.gguf` file, a built-in name or a known shape such as `llama-3.1-8b`.
        method: an adapter (`lora`), one over a 4-bit base (`qlora`), or all parameters (`full`).
        loop: `twofold`, or `peft` for the usual loop of transformers and PEFT; `full` is always the usual loop.
        dtype: type of the frozen weights.
        quantization: of the base's linear layers; `qlora` means nf4 where nothing is said.
        sequence_length: tokens of an example.
        batch_size: examples in one forward pass.
        supervised_share: share of the tokens whose loss counts.
        gradient_checkpointing: keep only each layer's input.
        device: where it is to run, `cpu` or `cuda`, which need not be here; `auto` takes what is here.
        memory: how much there is, such as 24GB or 16GiB; this machine's own when not given.
        devices: how many share the work.
        learning_rate: to be judged beside alpha and the width, when given.
    """

    base: str = DEFAULT_BASE
    method: Method = "lora"
    loop: Literal["twofold", "peft"] = "twofold"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Quantization = "none"
    sequence_length: int = 1024
    batch_size: int = 4
    supervised_share: float = 0.5
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    memory: str | None = None
    devices: int = 1
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_volume(self)
        for name in ("sequence_length", "batch_size", "devices"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)} but must be at least 1")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate} but must be above 0")
        if not 0 < self.supervised_share <= 1:
            raise ConfigError(f"supervised_share is {self.supervised_share} but must be above 0 and at most 1")
        if self.method == "full" and self.quantization != "none":
            raise ConfigError("a quantised base cannot be trained whole; use method 'qlora', or quantization 'none'")

        if self.memory is not None:
            bytes_in(self.memory)

    @property
    def lora(self) -> LoraConfig:
        """The adapter's own configuration."""
        return LoraConfig(**{f.name: getattr(self, f.name) for f in fields(LoraConfig)})

    @property
    def element_type(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def trained(self) -> Trained:
        return "full" if self.method == "full" else "lora"

    @property
    def quantized(self) -> Quantization:
        return "nf4" if self.method == "qlora" and self.quantization == "none" else self.quantization

    @property
    def target(self) -> str:
        """The kind of device."""
        return pick_device() if self.device == "auto" else self.device


@dataclass(frozen=True)
class Outline:
    """What planning needs to know of a base."""

    shapes: dict[str, ModuleShape]
    parameters: int
    sizes: Architecture
    fast: bool


@lru_cache(maxsize=4)
def outline(reference: str) -> Outline:
    """Read a base's configuration; no weights.

    Raises:
        BaseError: no such base.
    """
    model = meta_model(reference)
    count = sum(p.numel() for p in model.parameters())
    return Outline(module_shapes(model), count, architecture(model), isinstance(describe(model), Decoder))


def plan(settings: PlanSettings) -> dict[str, Any]:
    """Parameters, exact; memory and time, estimated; what to change; all as one JSON document.

    Raises:
        TargetError: the adapter's targets match nothing.
        ConfigError: a variant or a start is asked of a module that it is not defined for.
        BaseError: no such base.
    """
    base = outline(settings.base)
    parameters, memory = costs(base, settings)
    found = {
        "base": settings.base,
        "method": settings.method,
        "loop": path(base, settings),
        "parameters": _parameters(parameters, settings),
        "memory": memory.as_json(),
        **memory.explained(),
        "time": _time(base, settings, memory),
        "adapter_file_bytes": 4 * parameters.trainable,
        "advice": _advice(base, settings),
    }
    budget = _budget(settings)
    if budget is not None:
        found["budget"] = {"bytes": budget, "verdict": verdict(memory, budget), "changes": changes(settings, budget)}
    if settings.devices > 1:
        found["devices"] = _devices(base, settings)
    return found


def compare(settings: PlanSettings) -> dict[str, dict[str, Any]]:
    """The same training by every method, for a table."""
    return {m: plan(replace(settings, method=m, quantization="none")) for m in METHODS}


def costs(base: Outline, settings: PlanSettings) -> tuple[ParameterPlan, MemoryPlan]:
    """Parameters and memory on one device."""
    parameters = plan_parameters(settings.lora, base.shapes, base.parameters)
    return parameters, plan_memory(parameters, base.sizes, step(settings), setup(base, settings))


def step(settings: PlanSettings) -> StepShape:
    """Full sequences."""
    tokens = settings.sequence_length * settings.batch_size
    return StepShape(
        tokens=tokens,
        length=settings.sequence_length,
        supervised_tokens=round(tokens * settings.supervised_share),
        element_bytes=settings.element_type.itemsize,
        recompute=settings.gradient_checkpointing,
    )


def setup(base: Outline, settings: PlanSettings) -> Setup:
    """The loop and what surrounds it."""
    loop = LOOPS[path(base, settings)]
    return Setup(
        loop=loop,
        method=settings.trained,
        quantization=settings.quantized,
        device=settings.target,
        held=HELD_BYTES,
        devices=settings.devices,
        kernels=loop is FAST and why_not(settings.element_type, torch.device(settings.target)) is None,
    )


LOOPS: Mapping[str, Loop] = {"fast": FAST, "plain": PLAIN, "peft": STOCK, "full": STOCK_FULL}


def path(base: Outline, settings: PlanSettings) -> str:
    """Which of `LOOPS` trains this."""
    if settings.method == "full":
        return "full"
    if settings.loop == "peft":
        return "peft"
    return "fast" if base.fast else "plain"


def _parameters(found: ParameterPlan, settings: PlanSettings) -> dict[str, Any]:
    if settings.method == "full":
        return {"base": found.base, "trainable": found.base, "fraction": 1.0, "modules": 0, "ranks": 0}
    return {**asdict(found), "fraction": found.fraction}


def _time(base: Outline, settings: PlanSettings, memory: MemoryPlan) -> dict[str, Any] | None:
    """Seconds on this machine; None for a device that is not here, or weights that are unpacked on the way."""
    if settings.target != pick_device() or settings.quantized != "none":
        return None
    kernels = setup(base, settings).kernels
    rates = measure_rates(base.sizes, settings.element_type, torch.device(settings.target), kernels=kernels)
    found: TimePlan = plan_time(memory, step(settings), settings.trained, rates)
    return found.as_json()


UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def bytes_in(text: str) -> int:
    """The bytes in a text such as `24GB` or `16 GiB`.

    Raises:
        ConfigError: it says no amount.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)", text.strip().upper())
    if not found or found[2] not in UNITS:
        raise ConfigError(f"memory is '{text}' but should be an amount such as 24GB or 16GiB")
    return round(float(found[1]) * UNITS[found[2]])


def _budget(settings: PlanSettings) -> int | None:
    if settings.memory is not None:
        return bytes_in(settings.memory)
    return memory_capacity(torch.device(settings.target)) if settings.target == pick_device() else None


def verdict(memory: MemoryPlan, budget: int) -> Literal["fits", "tight", "does not fit"]:
    """Tight is when the expected fits but the high does not."""
    if memory.bounds[1] <= budget:
        return "fits"
    return "tight" if memory.expected <= budget else "does not fit"


def changes(settings: PlanSettings, budget: int) -> list[dict[str, Any]]:
    """What each change alone would save, planned anew, best first; and all of them together."""
    base = outline(settings.base)
    before = costs(base, settings)[1].expected

    def told(change: str, changed: PlanSettings) -> dict[str, Any]:
        memory = costs(base, changed)[1]
        return {"change": change, "saves": before - memory.expected, "verdict": verdict(memory, budget)}

    single = [told(text, edit(settings)) for text, edit in possible_changes(settings)]
    every = settings
    for _, edit in possible_changes(settings):
        every = edit(every)
    return [*sorted((c for c in single if c["saves"] > 0), key=lambda c: -c["saves"]), told("all of these", every)]


def possible_changes(settings: PlanSettings) -> Iterator[tuple[str, Callable[[PlanSettings], PlanSettings]]]:
    """Whatever is left to change, in words and as an edit."""
    if settings.method == "full":
        yield "an adapter instead of all parameters (--method lora)", lambda s: replace(s, method="lora")
    if settings.dtype == "float32":
        yield "16-bit weights (--dtype bfloat16)", lambda s: replace(s, dtype="bfloat16")
    if settings.quantized == "none":
        yield "a 4-bit base (--method qlora)", lambda s: replace(s, method="qlora")
    if not settings.gradient_checkpointing:
        text = "gradient checkpointing (--gradient-checkpointing)"
        yield text, lambda s: replace(s, gradient_checkpointing=True)
    if (size := settings.batch_size // 2) >= 1:
        yield f"{size} examples at once, accumulated (--batch-size {size})", lambda s: replace(s, batch_size=size)
    if (length := settings.sequence_length // 2) >= 1:
        text = f"at most {length} tokens (--sequence-length {length})"
        yield text, lambda s: replace(s, sequence_length=length)
    step = 2 if settings.init_lora_weights == "orthogonal" else 1  # which takes even ranks alone
    if settings.method != "full" and (r := settings.r // 2 // step * step) >= 1:
        yield f"rank {r} (--r {r})", lambda s: replace(s, r=r)


def _devices(base: Outline, settings: PlanSettings) -> dict[str, Any]:
    """What each device holds when each has the whole model, and when they share it, for which the fast path is not made."""
    parameters, whole = costs(base, settings)
    alone = setup(base, settings)
    together = replace(alone, loop=PLAIN, kernels=False) if alone.loop is FAST else alone
    sharded = plan_sharded(parameters, base.sizes, step(settings), together)
    return {"count": settings.devices, "data_parallel": whole.as_json(), "sharded": sharded.as_json()}


def _advice(base: Outline, settings: PlanSettings) -> list[str]:
    if settings.method == "full":
        return []
    hidden, rate = base.sizes.hidden, settings.learning_rate
    lora, attention_only = settings.lora, settings.target_modules == "attention"
    on_rate = [advice.rate_to_begin_with(hidden)] if rate is None else advice.rate_advice(rate, lora, hidden)
    others = (advice.scale_advice(lora), advice.rank_advice(lora), advice.target_advice(attention_only))
    return [*on_rate, *(line for found in others for line in found)]
