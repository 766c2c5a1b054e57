"""What LoRA promises by construction, measured: a fresh adapter changes nothing, and a merged model is as fast as the base.

Tokens are made one at a time by three models in turns: the base, the base with its adapter apart, and the merged model as it was
written to disk and read again. The time of a token is taken from the first to the last of an answer, so that what is prepared
once, and the prompt, do not count.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from twofold.adapter.attach import attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import open_adapter
from twofold.base.batch import Example
from twofold.base.load import Base, Precision, load_base
from twofold.data.examples import DataConfig
from twofold.engine.engine import Engine
from twofold.engine.request import Request
from twofold.events import silent
from twofold.merging.checkpoint import write_merged
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.proof import compared_rows, logits_at, pad_token, proof_batch
from twofold.recipes.tasks import TASKS

ROUNDS, TOKENS = 7, 32
"""How often each model answers, and how long its answers are."""


def prove(base: Base, data: Path, adapter: Path) -> dict[str, Any]:
    """Both measurements.

    Args:
        base: without adapters.
        data: held-out examples, the first of which is the prompt.
        adapter: a trained one; its configuration is that of the fresh one too.

    Returns:
        zero_at_start: whether all logits are those of the base, bit for bit; milliseconds_per_token: of each model, by round.
    """
    examples = TASKS["causal-lm"].examples(str(data), DataConfig(train=str(data)), base, silent).items
    same, compared = nothing_changes(base, examples, open_adapter(adapter).config)
    times = _timed(base, list(examples[0].token_ids), adapter)
    return {"zero_at_start": same, "logits_compared": compared, "milliseconds_per_token": times}


def nothing_changes(base: Base, examples: Sequence[Example], config: LoraConfig) -> tuple[bool, int]:
    """Whether all logits over a few examples are the base's, bit for bit, with a fresh adapter; and how many they are."""
    batch, pad_id = proof_batch(examples, base.device), pad_token(base)
    rows = compared_rows(base.model, batch)
    before = logits_at(base.model, batch, rows, pad_id)
    attach(base.model, config, "fresh")
    try:
        return torch.equal(before, logits_at(base.model, batch, rows, pad_id)), before.numel()
    finally:
        detach(base.model, "fresh")


def _timed(base: Base, prompt: list[int], adapter: Path) -> dict[str, list[float]]:
    dtype = next(p for p in get_args(Precision) if f"torch.{p}" == str(base.dtype))
    apart = load_with_adapters(base.reference, [str(adapter)], dtype, base.device.type)
    with tempfile.TemporaryDirectory() as folder:
        written = write_merged(apart.model, apart.tokenizer, Path(folder) / "merged")
        merged = load_base(str(written), dtype, base.device.type)
    engines = {"base": base.model, "adapter apart": apart.model, "merged": merged.model}
    return in_turns({name: Engine(model) for name, model in engines.items()}, prompt)


def in_turns(engines: Mapping[str, Engine], prompt: list[int]) -> dict[str, list[float]]:
    """Milliseconds a token of each, by round; a round before the first is not counted."""
    asked = Request(token_ids=prompt, max_new_tokens=TOKENS)
    found: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(ROUNDS + 1):
        for name, engine in engines.items():
            times = [time.perf_counter() for _ in engine.stream(asked)]
            if round_:
                found[name].append(1000 * (times[-1] - times[0]) / (len(times) - 1))
    return found


def medians(found: Mapping[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Of each model the median of its rounds, and half the distance of their quartiles."""
    quartiles = {name: statistics.quantiles(each, n=4) for name, each in found.items()}
    return {name: (q[1], (q[2] - q[0]) / 2) for name, q in quartiles.items()}
