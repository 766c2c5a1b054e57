"""Elementwise functions as single kernels, by torch.compile, where that is asked for.

Between two matrix products a decoder layer does little work on many values: norms, rotations, activations. Each of torch's
operations there reads and writes them all once more. Those functions are marked `fusible`; within `fused_kernels` each
runs as what torch.compile makes of it. The products are left alone, for nothing beats the libraries that compute them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from twofold.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


class _Switch:
    """Of the process, not of a thread: autograd runs the backward of a GPU's tensors in a thread of its own."""

    on = False


def fusible(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function of tensors that torch.compile may turn into one kernel; it must hold for any number of rows."""
    compiled = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> T:
        return (compiled() if _Switch.on else function)(*args, **named)

    return run


@contextmanager
def fused_kernels(device: torch.device) -> Iterator[None]:
    """Run fusible functions compiled, each from its first call on, for the length of a `with` block.

    Raises:
        ConfigError: torch.compile cannot make a kernel for this device here.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:
        raise ConfigError(
            f"torch.compile makes no kernels for {device.type} here ({_first_line(error)}); it needs a C++ compiler on a CPU "
            "and triton on a GPU; install that, or set training.compile to false"
        ) from error
    before, _Switch.on = _Switch.on, True
    try:
        yield
    finally:
        _Switch.on = before


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
