"""Functions that something faster may take the place of, where that is asked for: kernels of our own, or compiled ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Replacements = Mapping[Callable[..., Any], Callable[..., Any]]
_in_place: Replacements = {}
"""Of the process, not of a thread: autograd runs the backward of a GPU's tensors in a thread of its own."""


def replaceable(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that may be replaced by another that computes the same."""

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> T:
        found: Callable[P, T] = _in_place.get(run, function)
        return found(*args, **named)

    return run


def original(run: Callable[P, T]) -> Callable[P, T]:
    """What a replaceable function is when nothing takes its place."""
    found: Callable[P, T] = run.__wrapped__  # type: ignore[attr-defined]
    return found


@contextmanager
def replaced(found: Replacements) -> Iterator[None]:
    """Run other functions in place of replaceable ones, for the length of a `with` block."""
    global _in_place  # noqa: PLW0603
    before, _in_place = _in_place, {**_in_place, **found}
    try:
        yield
    finally:
        _in_place = before
