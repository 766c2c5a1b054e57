"""The command that serves an adapter in vLLM, with the limits that this adapter needs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from twofold.adapter.files import AdapterFiles
from twofold.errors import ConfigError
from twofold.lowrank.factors import LowRank
from twofold.merging.export.factors import largest_rank

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `--max-lora-rank`; its default of 16 refuses larger adapters, and a larger one takes memory and time."""


def vllm_command(files: AdapterFiles, updates: Mapping[str, LowRank], base: str, name: str) -> str:
    """One line for a shell.

    Args:
        updates: of the adapter, which has no others: vLLM refuses DoRA, biases and whole modules.

    Raises:
        ConfigError: the rank is above what vLLM can be told, or a module is one that vLLM adapts not.
    """
    rank = largest_rank(files.config)  # vLLM asks the config, though no module may have the rank it gives to all
    limit = next((r for r in RANKS if r >= rank), None)
    if limit is None:
        raise ConfigError(
            f"{files.path} has rank {rank}, but vLLM takes at most {RANKS[-1]}; make it smaller (twofold resize)"
        )
    if heads := [module for module in updates if "layers." not in module]:
        raise ConfigError(
            f"vLLM adapts the layers of a model alone, and {', '.join(heads[:4])} lies outside; merge this adapter into its base "
            "(twofold merge)"
        )
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(limit), "--max-loras", "1"]
    words += ["--lora-modules", f"{name}={files.path}"]
    return shlex.join(words)
