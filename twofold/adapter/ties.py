"""Modules with one weight, which PEFT's `ensure_weight_tying` trains together: its config names one, its file holds them all."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from twofold.adapter.config import LoraConfig, Names
from twofold.adapter.keys import PREFIX, split_key
from twofold.adapter.names import matcher, parents
from twofold.adapter.peft_config import with_changes
from twofold.tensorfile import TensorFile

WHOLE = ("weight",)
TABLE = ("lora_embedding_B", "lora_embedding_A")
HEAD = ("lora_A.weight", "lora_B.weight")
"""The factors of a head, which are those of the embedding that has its weight, turned round."""


def untied(config: LoraConfig, tensors: TensorFile) -> LoraConfig:
    """The config with the names of all modules that are trained with one that it names, so that no tie need be known to read it.

    Such a module is one that the config does not name, and whose tensors are in the file with the same values.
    """
    if not config.ensure_weight_tying:
        return config
    saved = config.modules_to_save or ()
    return with_changes(
        config,
        modules_to_save=_with_names(saved, _twins(tensors, saved, WHOLE, WHOLE)) or None,
        target_modules=_with_names(config.target_modules, _twins(tensors, config.target_modules, TABLE, HEAD)),
        ensure_weight_tying=False,
    )


def _twins(tensors: TensorFile, named: Names, suffixes: tuple[str, ...], theirs: tuple[str, ...]) -> list[str]:
    """Modules that are not `named` and hold under `theirs` what a named one holds under `suffixes`."""
    is_named = matcher(named)
    modules = dict.fromkeys(split_key(key)[0] for key in tensors.shapes)
    inside = {m for m in modules if any(map(is_named, parents(m)))}
    return [
        m
        for m in modules
        if m not in inside
        and any(_same(tensors, zip(_keys(m, theirs), _keys(n, suffixes), strict=True)) for n in inside)
    ]


def _keys(module: str, suffixes: Iterable[str]) -> list[str]:
    return [f"{PREFIX}{module}.{suffix}" for suffix in suffixes]


def _same(tensors: TensorFile, pairs: Iterable[tuple[str, str]]) -> bool:
    """Whether both tensors of each pair are in the file, with the same values, as they are or turned round."""
    return all({a, b} <= tensors.shapes.keys() and _equal(tensors, a, b) for a, b in pairs)


def _equal(tensors: TensorFile, a: str, b: str) -> bool:
    one, other = tensors.read(a), tensors.read(b)
    return torch.equal(one, other.T if "lora_" in b else other)


def _with_names(given: Names, more: list[str]) -> Names:
    """Names, or one regular expression, and further names in full."""
    if isinstance(given, str):
        return "|".join([given, *map(re.escape, more)])
    return (*given, *more)
