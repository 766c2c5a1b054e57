"""`twofold serve`: what is served, and how much of the machine it may take."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from twofold.base.blocks import Decoder, describe
from twofold.base.load import BUILT_IN, DEFAULT_BASE, Base, Precision, load_base, public_name
from twofold.engine.cache import slot_bytes
from twofold.engine.encoder import Encoder, load_encoder
from twofold.engine.scheduler import Scheduler
from twofold.engine.weights import why_not_native
from twofold.errors import ConfigError
from twofold.events import Emit, Warned, silent
from twofold.layers.quantised import QuantisedLinear
from twofold.native.build import built
from twofold.quant import Kind, Scheme

CONTEXT = 2048
"""Tokens of a stream where neither the flags nor the base say fewer."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A base and a folder of adapters, served over HTTP.

    Attributes:
        base: a Hugging Face directory, a hub id, a `.gguf` file or a built-in name.
        adapters: folder with the adapters, which is watched; nothing outside of it is read.
        name: what requests call the base; its own name, if not given.
        embeddings: an encoder beside the base, for /v1/embeddings: a Hugging Face directory or a hub id.
        host: address to listen on.
        port: port to listen on.
        api_key: keys that requests may carry; none: no key is needed. TWOFOLD_API_KEY adds one.
        admin_key: keys that may load and unload adapters; none: every key may. Without an api_key they guard nothing else.
        allowed_hosts: names that requests may call the server by, besides localhost and addresses; `*` for any.
        allowed_origins: origins of web pages that may use the server; `*` for all.
        dtype: type of the base's weights; `auto` takes bfloat16 where our own kernels decode, else what this machine multiplies
            fastest.
        device: `auto` takes a GPU where there is one.
        weights: `taken` keeps each weight once, in the form that decodes fastest; `int8` in eight bits, adapters as they are.
        merge_after: steps in a row with one adapter's traffic alone after which it is folded into a second copy of the
            weights; none: never.
        prefix_cache: let a prompt go on from what earlier ones with the same adapters at the same scales have left in memory.
        quantization: pack the base's linear layers while they are read, `nf4` or `int8`.
        allow_foreign_base: serve adapters that were trained on another base.
        streams: answers that are made side by side.
        context: most tokens of a prompt and its answer together; what the base was made for, up to 2048, if not given.
        cache_memory_mb: most megabytes of keys and values, for which fewer streams are made; none: as many as streams of that
            context take.
        default_tokens: most tokens of a conversation's answer that does not say; none: as many as fit.
        max_queued: answers that may wait; more get status 429.
        max_body_mb: most megabytes of a request.
        deadline_seconds: after which an answer is given up.
        drain_seconds: for which answers may end once the server was told to stop.
        adapter_memory_mb: megabytes of adapters in memory; the least recently used go first.
        max_adapter_mb: most megabytes of one adapter.
        max_rank: highest rank of an adapter.
        poll_seconds: between two looks at the adapter folder.
        engine: `vllm` starts vLLM over the same folder, with limits that follow from what lies in it.
        vllm_python: the Python of the environment that has vLLM; this one, if not given.
        vllm_flags: more flags for vLLM in one text, as --vllm-flags="--seed 3".
    """

    base: str = DEFAULT_BASE
    adapters: Path | None = None
    name: str | None = None
    embeddings: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[str, ...] = field(default=(), repr=False)
    admin_key: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    dtype: Precision = "auto"
    device: str = "auto"
    weights: Literal["taken", "int8"] = "taken"
    merge_after: int | None = None
    prefix_cache: bool = True
    quantization: Kind | None = None
    allow_foreign_base: bool = False
    streams: int = 32
    context: int | None = None
    cache_memory_mb: float | None = None
    default_tokens: int | None = None
    max_queued: int = 256
    max_body_mb: float = 4.0
    deadline_seconds: float = 600.0
    drain_seconds: float = 30.0
    adapter_memory_mb: float = 2048.0
    max_adapter_mb: float = 512.0
    max_rank: int = 256
    poll_seconds: float = 2.0
    engine: Literal["twofold", "vllm"] = "twofold"
    vllm_python: Path | None = None
    vllm_flags: str = ""

    def __post_init__(self) -> None:
        for name in (
            "streams",
            "max_body_mb",
            "deadline_seconds",
            "drain_seconds",
            "adapter_memory_mb",
            "max_adapter_mb",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)} but must be above 0")
        for name in ("max_rank", "poll_seconds", "context", "cache_memory_mb", "default_tokens", "merge_after"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value} but must be above 0")
        if self.max_queued < 0 or not 0 <= self.port < 65536:
            raise ConfigError("max_queued must be at least 0, and port a number up to 65535")
        for name in ("api_key", "admin_key"):
            object.__setattr__(self, name, tuple(usable_key(name, key) for key in getattr(self, name)))
        if self.engine != "vllm" and (self.vllm_python or self.vllm_flags):
            raise ConfigError("vllm_python and vllm_flags are for engine vllm; set --engine vllm")


def usable_key(name: str, key: str) -> str:
    """A key without the space around it, such as the end of the line that it was read from.

    Raises:
        ConfigError: no request can carry it; `name` says whence it came.
    """
    key = key.strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{name} is empty or not of printable ASCII, so no request can carry it")
    return key


@dataclass(frozen=True)
class Served:
    """A base ready to answer.

    Attributes:
        names: what requests may call it by, the first of them shown to others.
        context: tokens of a prompt and its answer together.
        encoder: for embeddings, if there is to be one.
    """

    base: Base
    scheduler: Scheduler
    names: tuple[str, ...]
    context: int
    encoder: Encoder | None = None


def load_served(config: ServeConfig, emit: Emit = silent) -> Served:
    """Load the base and make its scheduler; the encoder first, since it is the smaller one and may turn out not to be there.

    Raises:
        UserError: the base, its tokenizer or the adapter folder cannot be used.
    """
    if config.adapters is not None and not config.adapters.is_dir():
        raise ConfigError(f"no adapter folder at {config.adapters}; make it first, or leave out --adapters")
    encoder = None if config.embeddings is None else load_encoder(config.embeddings, emit)
    names = names_of(config.base, config.name)
    if encoder is not None and encoder.name in names:
        raise ConfigError(f"the base and the encoder are both called '{encoder.name}'; give the base another --name")
    scheme = None if config.quantization is None else Scheme(config.quantization)
    base = load_base(config.base, config.dtype, config.device, emit, scheme)
    if config.dtype == "auto":
        _halve(base)
    context = _context(base, config.context)
    scheduler = Scheduler(
        base.model,
        streams=_streams(base, config, context, emit),
        capacity=context,
        reuse=config.prefix_cache,
        weights=config.weights,
        merge_after=config.merge_after,
    )
    return Served(base, scheduler, names, context, encoder)


def _halve(base: Base) -> None:
    """Weights of float32 that our own kernels decode become bfloat16: a pass reads them all once, and half the bytes are half the
    time, also on a machine that multiplies float32 faster. Packed weights know the type they multiply in, and stay."""
    described = describe(base.model)
    packed = any(isinstance(m, QuantisedLinear) for m in base.model.modules())
    if packed or base.dtype != torch.float32 or not isinstance(described, Decoder):
        return
    if why_not_native(described) is None and built():
        for parameter in base.model.parameters():
            parameter.data = parameter.data.bfloat16()


def _context(base: Base, asked: int | None) -> int:
    made_for = getattr(base.model.config, "max_position_embeddings", None)
    if asked is not None and made_for is not None and asked > made_for:
        raise ConfigError(f"context is {asked}, but {base.public_name} was made for {made_for} tokens")
    return asked or min(made_for or CONTEXT, CONTEXT)


def _streams(base: Base, config: ServeConfig, context: int, emit: Emit) -> int:
    """As many as were asked for, or fewer where the keys and values of all would take more memory than they may."""
    if config.cache_memory_mb is None:
        return config.streams
    described = describe(base.model)
    if not isinstance(described, Decoder):
        raise ConfigError(
            f"{base.public_name} runs by its own forward ({described.reason}), whose keys and values take memory as they come; "
            "leave out --cache-memory-mb"
        )
    one = slot_bytes(described, context)
    found = min(config.streams, round(config.cache_memory_mb * 1e6) // one)
    takes = f"the keys and values of one stream of {context} tokens take {one / 1e6:.4g} MB"
    if not found:
        raise ConfigError(
            f"{takes}, more than the {config.cache_memory_mb:g} of --cache-memory-mb; raise it, or lower --context"
        )
    if found < config.streams:
        said = f"and --cache-memory-mb is {config.cache_memory_mb:g}"
        emit(Warned(text=f"{found} streams instead of {config.streams}: {takes}, {said}"))
    return found


def names_of(reference: str, given: str | None) -> tuple[str, ...]:
    """What requests may call a base: the name that was given, or its own and a built-in's short one."""
    if given is not None:
        return (given,)
    own = public_name(reference)
    return (own, reference) if reference in BUILT_IN else (own,)
