"""Elementwise functions as single kernels, by torch.compile, where that is asked for.

Between two matrix products a decoder layer does little work on many values: norms, rotations, activations. Each of torch's
operations there reads and writes them all once more. Those functions are marked `fusible`; within `fused_kernels` each
runs as what torch.compile makes of it. The products are left alone, for nothing beats the libraries that compute them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from twofold.errors import ConfigError
from twofold.replaceable import original, replaceable, replaced

P = ParamSpec("P")
T = TypeVar("T")

_fusible: list[Callable[..., Any]] = []


def fusible(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function of tensors that torch.compile may turn into one kernel; it must hold for any number of rows."""
    run = replaceable(function)
    _fusible.append(run)
    return run


@functools.cache
def _compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    found: Callable[..., Any] = torch.compile(original(run))
    return found


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
    with replaced({run: functools.partial(_run_compiled, run) for run in _fusible}):
        yield


def _run_compiled(run: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return _compiled(run)(*args, **named)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
