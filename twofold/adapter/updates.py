"""The factors in an adapter's files as low-rank updates, without a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from twofold.adapter.config import resolve
from twofold.adapter.experts import parameters_named, placed
from twofold.adapter.files import AdapterFiles, listed, open_adapter
from twofold.adapter.shapes import Kind
from twofold.errors import AdapterFileError
from twofold.lowrank.factors import LowRank

PARTNERS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
PARTNERS |= {b: a for a, b in PARTNERS.items()}

TRANSPOSED: tuple[Kind, ...] = ("conv1d", "embedding")
"""Kinds of modules whose weight lies as (in, out), while their factors' product is (out, in)."""


@dataclass(frozen=True)
class Pair:
    """Two tensors of a file, or one expert's parts of them, that make one update: of a module, or of a part of one, of which
    attention has two.

    Attributes:
        module: its path in the model.
        name: the path, and the part's behind it.
        a, b: what follows the path in their keys.
        parameter: of the module, where it is one of its own that has the factors.
        expert, experts: which one of how many this is; none for a module as a whole.
    """

    module: str
    name: str
    a: str
    b: str
    parameter: str = ""
    expert: int = 0
    experts: int = 0

    @property
    def place(self) -> str:
        """What ranks and scales go by: the module, or its parameter with all of its experts."""
        return f"{self.module}.{self.parameter}" if self.parameter else self.module

    @property
    def bias(self) -> str:
        """What follows the path in the key of a bias of B, where there is one."""
        return f"{self.a.rpartition('lora_')[0]}lora_B.bias"


def open_updates(path: Path) -> AdapterFiles:
    """An adapter folder whose tensors and config together say what its updates are.

    Raises:
        AdapterFileError: as `open_adapter`; one factor without the other; or factors whose rank is not the config's, or of which
            nothing tells whose they are.
    """
    files = open_adapter(path)
    if wrong := unresolved(files):
        raise AdapterFileError(
            f"the config of the adapter at {path} does not fit its tensors: {listed(list(wrong.values()))}"
        )
    return files


def unresolved(files: AdapterFiles) -> dict[str, str]:
    """By name of an update, why the config does not give its scale: another rank, or several parameters that it may be of."""
    found = {}
    for pair in pairs_of(files):
        rows, r = files.tensors.shapes[files.modules()[pair.module][pair.a]][0], resolve(files.config, pair.place).r
        if not pair.experts and parameters_named(files.config, pair.module):
            found[pair.name] = (
                f"nothing tells which factors of '{pair.module}' are of which of its parameters (target_parameters); merge it into "
                "its base instead"
            )
        elif rows != (pair.experts or 1) * r:
            found[pair.name] = (
                f"'{pair.name}' has rank {rows} in the tensors but {r} by the config, so its scale is wrong"
            )
    return found


def pairs_of(files: AdapterFiles) -> Iterator[Pair]:
    """Every pair of factors of an adapter, of experts one each; modules trained whole have none.

    Raises:
        AdapterFileError: one factor without the other.
    """
    for module, keys in files.modules().items():
        yield from _by_expert(files, module, list(_pairs_in(files, module, keys)))


def _pairs_in(files: AdapterFiles, module: str, keys: Collection[str]) -> Iterator[Pair]:
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


def _by_expert(files: AdapterFiles, module: str, pairs: list[Pair]) -> Iterator[Pair]:
    """The pairs of one module; those of experts, whose ranks lie side by side in a file, apart."""
    inner_first = sorted(pairs, key=lambda pair: len(pair.a), reverse=True)
    rows = [len(factors(files, pair)[0]) for pair in inner_first]
    found = placed(files.config, module, rows) if pairs else None
    if found is None:
        yield from pairs
        return
    for pair, (parameter, experts) in zip(inner_first, found, strict=True):
        for e in range(experts):  # one map alone has the parameter's own name
            name = f"{module}.{parameter}" if experts == 1 else f"{module}.{parameter}[{e}]"
            yield replace(pair, name=name, parameter=parameter, expert=e, experts=experts)


def updates_of(files: AdapterFiles) -> dict[str, LowRank]:
    """Every update of an adapter, by name: of a module, or of a part of one."""
    return {pair.name: low_rank(files, pair) for pair in pairs_of(files)}


def low_rank(files: AdapterFiles, pair: Pair) -> LowRank:
    """A pair as two matrices, at the scale of its place."""
    a, b = (tensor.flatten(1) for tensor in factors(files, pair))
    r, _, scale = resolve(files.config, pair.place)
    if pair.experts:
        inside = b.view(len(b), r, pair.experts)[:, :, pair.expert]
        return LowRank(a[pair.expert * r : (pair.expert + 1) * r], inside, scale)
    if len(a) != b.shape[1]:  # a convolution with groups: each group of outputs has its own part of the rank
        b = torch.block_diag(*b.chunk(len(a) // b.shape[1]))
    return LowRank(a, b, scale)


def factors(files: AdapterFiles, pair: Pair) -> tuple[Tensor, Tensor]:
    """A pair's two tensors, as they are stored."""
    keys = files.modules()[pair.module]
    return files.tensors.read(keys[pair.a]), files.tensors.read(keys[pair.b])


def has_groups(files: AdapterFiles, pair: Pair) -> bool:
    """Whether it is of a convolution with groups: each group of outputs then has its own part of the rank."""
    keys = files.modules()[pair.module]
    return files.tensors.shapes[keys[pair.a]][0] != files.tensors.shapes[keys[pair.b]][1]
