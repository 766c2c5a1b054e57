"""What this machine does well, and how much memory is in use."""

from __future__ import annotations

import sys
import time
from functools import lru_cache

import psutil
import torch

from twofold.errors import ConfigError


def pick_device() -> str:
    """A CUDA GPU, else the CPU. Apple's GPU lacks float64 and is untried, so it is never chosen unasked."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def checked_device(name: str) -> torch.device:
    """The device of that name, `auto` included, if this machine has it.

    Raises:
        ConfigError: no such device.
    """
    chosen = pick_device() if name == "auto" else name
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device '{name}' is not to be had on this machine ({reason}); use 'cpu' or 'auto'"
        ) from error


@lru_cache
def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its products run clearly faster than float32's, which on many CPUs they do not."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _seconds(torch.bfloat16, device) < 0.8 * _seconds(torch.float32, device) else torch.float32


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The best of a few products of a layer's size."""
    x, w = torch.ones(256, 1024, dtype=dtype, device=device), torch.ones(1024, 1024, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        _ = (x @ w).sum().item()
        best = min(best, time.perf_counter() - start)
    return best


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the device on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes(device: torch.device) -> int:
    """The memory held now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_ran_out(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is want of memory, which PyTorch on a CPU says in words alone."""
    if error is None:
        return False
    said = any(words in str(error).lower() for words in ("allocate memory", "not enough memory", "bad_alloc"))
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError) or memory_ran_out(error.__cause__)
