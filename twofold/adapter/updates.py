"""The factors in an adapter's files as low-rank updates, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from twofold.adapter.config import resolve
from twofold.adapter.experts import placed
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
    found: dict[str, list[Pair]] = {}
    for pair in pairs_of(files):
        found.setdefault(pair.module, []).append(pair)
    return {name: update for pairs in found.values() for name, update in _updates(files, pairs)}


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


def _updates(files: AdapterFiles, pairs: list[Pair]) -> Iterator[tuple[str, LowRank]]:
    """The pairs of one module as matrices; of experts, whose ranks lie side by side in a file, a pair each."""
    inner_first = sorted(pairs, key=lambda pair: len(pair.a), reverse=True)
    rows = [len(factors(files, pair)[0]) for pair in inner_first]
    found = placed(files.config, pairs[0].module, rows)
    if found is None:
        yield from ((pair.name, _of_module(files, pair)) for pair in pairs)
        return
    for pair, parameter in zip(inner_first, found, strict=True):
        yield from _of_experts(files, pair, f"{pair.module}.{parameter.name}", parameter.experts)


def _of_module(files: AdapterFiles, pair: Pair) -> LowRank:
    a, b = (tensor.flatten(1) for tensor in factors(files, pair))
    if len(a) != b.shape[1]:  # a convolution with groups: each group of outputs has its own part of the rank
        b = torch.block_diag(*b.chunk(len(a) // b.shape[1]))
    return LowRank(a, b, resolve(files.config, pair.module).scale)


def _of_experts(files: AdapterFiles, pair: Pair, parameter: str, experts: int) -> Iterator[tuple[str, LowRank]]:
    """An update for each expert; of one map, by the parameter's own name."""
    a, b = factors(files, pair)
    r, _, scale = resolve(files.config, parameter)
    for e, inside in enumerate(a.chunk(experts)):
        name = parameter if experts == 1 else f"{parameter}[{e}]"
        yield name, LowRank(inside, b.view(len(b), r, experts)[:, :, e], scale)
