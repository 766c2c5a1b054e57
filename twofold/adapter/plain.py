"""Adapters made of updates that are known, written without a model.

Every update is folded into its factors, so that alpha equals the rank and the scale is 1 in every module: readers that do not
know patterns of rank and alpha, as some engines do not, then still take every update at its right volume.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from twofold import atomic
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import CONFIG, OURS, TENSORS, AdapterFiles, Provenance
from twofold.adapter.keys import PREFIX
from twofold.adapter.peft_config import Kept, exceptions, in_peft_words, with_changes
from twofold.adapter.updates import Pair
from twofold.errors import ConfigError
from twofold.lowrank.factors import LowRank
from twofold.tensorfile import nonfinite, write_tensors


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter that is ready to be written: tensors by key, and a config that fits them."""

    tensors: dict[str, Tensor]
    config: LoraConfig
    kept: Kept
    provenance: Provenance = field(default_factory=Provenance)

    def write(self, output: Path) -> Path:
        """Write it as a folder, whole or not at all.

        Raises:
            ConfigError: values of it are beyond what their type holds.
            RunError: the output exists or cannot be written.
        """
        if broken := nonfinite(self.tensors):
            kind = str(self.tensors[broken[0]].dtype).removeprefix("torch.")
            raise ConfigError(
                f"'{broken[0]}' would hold NaN or infinity, for its values are beyond {kind}; take smaller weights"
            )
        words = in_peft_words(self.config, self.kept)
        ours = {f.name: getattr(self.provenance, f.name) for f in fields(self.provenance)}
        with atomic.new_folder(output) as folder:
            write_tensors(folder / TENSORS, self.tensors)
            atomic.write_json(folder / OURS, ours)
            atomic.write_json(folder / CONFIG, words)
        return output


def kept_of(files: AdapterFiles) -> Kept:
    """What the config on disk says besides what `files` holds."""
    raw = json.loads((files.path / CONFIG).read_text(encoding="utf-8"))
    return Kept(files.base_name, raw.get("revision"), raw.get("task_type"), bool(raw.get("fan_in_fan_out")))


def plain_config(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """`config` with these ranks by module, and the scale 1 in each."""
    r = max(ranks.values())
    patterns = exceptions(ranks, r)
    return with_changes(
        config,
        r=r,
        lora_alpha=r,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        use_rslora=False,
        init_lora_weights=True,
        freeze_a=False,
    )


def ranks_of(updates: Mapping[Pair, LowRank]) -> dict[str, int]:
    """The rank of each place: the largest of its parts', which the others are filled up to; the same for all experts."""
    ranks: dict[str, int] = {}
    for pair, update in updates.items():
        ranks[pair.place] = max(update.rank, ranks.get(pair.place, 1))
    of_experts = {pair.place for pair in updates if pair.experts}
    return ranks | dict.fromkeys(of_experts, max((ranks[place] for place in of_experts), default=1))


def plain_tensors(
    updates: Mapping[Pair, LowRank], ranks: Mapping[str, int], shapes: Mapping[Pair, tuple[torch.Size, torch.Size]]
) -> dict[str, Tensor]:
    """Updates as tensors by key.

    Args:
        shapes: those of A and B as some adapter stores them, whose dimensions other than the rank are kept.
    """
    found = {}
    of_experts: dict[Pair, list[LowRank]] = {}
    for pair, update in updates.items():
        filled = _filled(update, ranks[pair.place])
        if pair.experts:
            of_experts.setdefault(replace(pair, name=pair.place, expert=0), []).append(filled)
            continue
        of_a, of_b = shapes[pair]
        found[f"{PREFIX}{pair.module}.{pair.a}"] = filled.A.reshape(filled.rank, *of_a[1:])
        found[f"{PREFIX}{pair.module}.{pair.b}"] = (filled.B * filled.scale).reshape(of_b[0], filled.rank, *of_b[2:])
    for pair, experts in of_experts.items():  # A expert by expert; in B the expert varies fastest (`layers/experts.py`)
        found[f"{PREFIX}{pair.module}.{pair.a}"] = torch.cat([update.A for update in experts])
        found[f"{PREFIX}{pair.module}.{pair.b}"] = torch.stack([u.B * u.scale for u in experts], 2).flatten(1)
    return found


def _filled(update: LowRank, r: int) -> LowRank:
    """The same update at a rank that is no smaller: the further directions are zero."""
    more = r - update.rank
    if not more:
        return update
    A = torch.cat([update.A, update.A.new_zeros(more, update.A.shape[1])])
    return LowRank(A, torch.cat([update.B, update.B.new_zeros(update.B.shape[0], more)], 1), update.scale)
