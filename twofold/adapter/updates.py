"""The factors in an adapter's files as low-rank updates, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from twofold.adapter.config import resolve
from twofold.adapter.files import AdapterFiles
from twofold.adapter.target import Kind
from twofold.errors import AdapterFileError
from twofold.lowrank.factors import LowRank

PARTNERS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
PARTNERS |= {b: a for a, b in PARTNERS.items()}

TRANSPOSED: tuple[Kind, ...] = ("conv1d", "embedding")
"""Kinds of modules whose weight lies as (in, out), while their factors' product is (out, in)."""


@dataclass(frozen=True)
class Pair:
    """Two tensors of a file that make one update: of a module, or of a part of one, as attention has two.

    Attributes:
        module: its path in the model.
        name: the path, and the part's behind it.
        a, b: what follows the path in their keys.
    """

    module: str
    name: str
    a: str
    b: str

    @property
    def bias(self) -> str:
        """What follows the path in the key of a bias of B, where there is one."""
        return f"{self.a.rpartition('lora_')[0]}lora_B.bias"


def pairs_of(files: AdapterFiles) -> Iterator[Pair]:
    """Every pair of factors of an adapter; modules trained whole have none.

    Raises:
        AdapterFileError: one factor without the other.
    """
    for module, keys in files.modules().items():
        for suffix in keys:
            prefix, mark, rest = suffix.rpartition("lora_")
            partner = PARTNERS.get(mark + rest)
            if partner is None:
                continue
            if prefix + partner not in keys:
                raise AdapterFileError(f"{files.path}: '{module}' has {suffix} without its partner")
            if rest in ("A.weight", "embedding_A"):
                part = prefix.removesuffix(".")
                yield Pair(module, f"{module}.{part}" if part else module, suffix, prefix + partner)


def updates_of(files: AdapterFiles) -> dict[str, LowRank]:
    """Every update of an adapter, by name: of a module, or of a part of one."""
    return {name: update for pair in pairs_of(files) for name, update in _updates(files, pair)}


def low_rank(files: AdapterFiles, pair: Pair) -> LowRank:
    """A pair as two matrices, at the scale of its module; of a convolution without groups, and not of experts."""
    a, b = (tensor.flatten(1) for tensor in factors(files, pair))
    return LowRank(a, b, resolve(files.config, pair.module).scale)


def factors(files: AdapterFiles, pair: Pair) -> tuple[Tensor, Tensor]:
    """A pair's two tensors, as they are stored."""
    keys = files.modules()[pair.module]
    return files.tensors.read(keys[pair.a]), files.tensors.read(keys[pair.b])


def has_groups(files: AdapterFiles, pair: Pair) -> bool:
    """Whether it is of a convolution with groups: each group of outputs then has its own part of the rank."""
    keys = files.modules()[pair.module]
    return files.tensors.shapes[keys[pair.a]][0] != files.tensors.shapes[keys[pair.b]][1]


def _updates(files: AdapterFiles, pair: Pair) -> Iterator[tuple[str, LowRank]]:
    """A pair of tensors as matrices; of experts, whose ranks lie side by side in a file, a pair each."""
    a, b = (tensor.flatten(1) for tensor in factors(files, pair))
    r, _, scale = resolve(files.config, pair.module)
    if len(a) != b.shape[1]:
        b = torch.block_diag(*b.chunk(len(a) // b.shape[1]))
    experts = len(a) // r if files.config.target_parameters and len(a) % r == 0 else 1
    if experts == 1:
        yield pair.name, LowRank(a, b, scale)
        return
    for e, inside in enumerate(a.chunk(experts)):
        yield f"{pair.name}[{e}]", LowRank(inside, b.view(len(b), r, experts)[:, :, e], scale)
