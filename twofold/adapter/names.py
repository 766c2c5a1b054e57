"""PEFT's rules for what a pattern says of a module's name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache


def matches(patterns: str | Iterable[str], name: str) -> bool:
    """PEFT's rule: one regular expression for the whole name, or a list of names and endings."""
    return matcher(patterns)(name)


def matcher(patterns: str | Iterable[str]) -> Callable[[str], bool]:
    """`matches` for many names, at a cost that does not grow with the length of the list."""
    if isinstance(patterns, str):
        whole = re.compile(patterns)
        return lambda name: whole.fullmatch(name) is not None
    listed = frozenset(patterns)
    return lambda name: not listed.isdisjoint(tails(name))


@lru_cache(maxsize=1 << 16)
def tails(name: str) -> tuple[str, ...]:
    """The name, and what follows each of its dots. Every pattern of every adapter asks this of the same few hundred names."""
    parts = name.split(".")
    return (name, *(".".join(parts[i:]) for i in range(1, len(parts))))


def parents(name: str) -> list[str]:
    """The names of the modules around it, from the outermost, and its own."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def matches_around(patterns: str | Iterable[str], name: str) -> bool:
    """Whether a module matches, or one that it lies in."""
    return any(matches(patterns, place) for place in parents(name))


def in_order(name: str) -> list[tuple[bool, int, str]]:
    """A key by which names are sorted with their numbers as numbers: layer 2 comes before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def layer_index(name: str, patterns: str | Iterable[str] | None) -> int | None:
    """The index of the layer that a module lies in, by PEFT's rule: the first number behind the name of a list; None outside the
    layers.
    """
    lists = [patterns] if isinstance(patterns, str) else list(patterns or ())
    rules = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in lists] or [r"(?:.*?\.)?[^.]*\.(\d+)\."]
    found = next(filter(None, (re.match(rule, name) for rule in rules)), None)
    return int(found.group(1)) if found else None
