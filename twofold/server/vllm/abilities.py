"""What vLLM can serve of an adapter, by its configuration and the header of its tensors.

This runs in vLLM's processes too: nothing but the standard library. The rules are those of vLLM 0.32
(`vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`, `vllm/config/lora.py`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from twofold.adapter.folder import CONFIG, TENSORS
from twofold.errors import AdapterFileError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Starts by name that leave the base alone; True and False are no names."""
FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
"""How the keys of all tensors end that vLLM reads."""
HEADS = ("classifier", "score")
MOST_HEADER_BYTES = 100_000_000
MISSING = {
    "use_dora": "DoRA",
    "lora_bias": "biases of the factors",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "trained rows of tokens",
    "target_parameters": "target_parameters",
}
"""Keys of the config that must be empty or false for vLLM, and what they ask for."""


class Described(NamedTuple):
    """An adapter as vLLM would see it.

    Attributes:
        rank: the highest of its modules.
        bytes: of its tensors' file.
        lacking: what vLLM does not do of it; empty if it can be served.
    """

    rank: int
    bytes: int
    lacking: tuple[str, ...]


class EngineLimits(NamedTuple):
    """vLLM's three limits of adapters."""

    max_lora_rank: int
    max_loras: int
    max_cpu_loras: int


def describe(folder: Path) -> Described:
    """What vLLM would make of an adapter.

    Raises:
        AdapterFileError: it cannot be read.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        shapes = _shapes(folder / TENSORS)
        ranks = [int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise AdapterFileError(f"{folder.name} is no adapter that can be read ({type(error).__name__})") from error
    ranks += [
        shape[0] for key, shape in shapes.items() if key.endswith(("lora_A.weight", "lora_embedding_A")) and shape
    ]
    return Described(max(ranks), (folder / TENSORS).stat().st_size, tuple(_lacking(config, shapes)))


def _shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by key, from the header of a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > min(MOST_HEADER_BYTES, path.stat().st_size):
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(size))
    return {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}


def _lacking(config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> Iterable[str]:
    if config.get("peft_type", "LORA") != "LORA":
        yield f"{config['peft_type']} adapters"
    yield from (words for key, words in MISSING.items() if config.get(key))
    if config.get("bias", "none") != "none":
        yield "biases of the base's modules"
    whole = [m for m in config.get("modules_to_save") or [] if m not in HEADS]
    if whole:
        yield f"whole modules ({', '.join(whole)})"
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in HARMLESS_STARTS:
        yield f"the start {start}, which changes the base"
    foreign = sorted(k for k in shapes if not k.endswith(FACTORS))
    if foreign and not whole:
        yield f"tensors such as {foreign[0]}"


def limits_for(adapters: Iterable[Described], at_once: int, budget_bytes: int) -> EngineLimits:
    """The limits with which vLLM can serve these adapters.

    vLLM pads every adapter of a batch to the highest rank, and keeps the memory for all of them from its start on: a slot costs
    what the largest would at that rank.

    Args:
        adapters: those that it can serve.
        at_once: most requests in a batch.
        budget_bytes: for the slots, and for what is kept beside them.
    """
    known = list(adapters)
    rank = _allowed(max((a.rank for a in known), default=1))
    slot = max((a.bytes * rank // max(a.rank, 1) for a in known), default=1)
    together = max(1, min(len(known), at_once, budget_bytes // max(slot, 1)))
    kept = budget_bytes // max((a.bytes for a in known), default=1)
    return EngineLimits(rank, together, max(together, min(len(known), kept)))


def _allowed(rank: int) -> int:
    """The least limit of vLLM's that lets a rank in.

    Raises:
        AdapterFileError: there is none.
    """
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise AdapterFileError(f"an adapter has rank {rank}, but vLLM takes at most {RANKS[-1]}")
