"""What this machine does well, and how much memory is in use."""

from __future__ import annotations

import ctypes
import math
import mmap
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from twofold.errors import ConfigError

MADV_PAGEOUT = 21
"""Of linux/mman.h; Python has no name for it."""
BEYOND_DOUBT = 0.05
"""Seconds: two products of this size take longer only where their type is emulated."""


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


def multiplied_in(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which this machine multiplies well what is stored in another: float32, or that one where it is the faster."""
    return stored if stored == fastest_dtype(device) else torch.float32


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The best of a few products; of two, where these take so long that there is no doubt."""
    x, w = torch.ones(64, 512, dtype=dtype, device=device), torch.ones(512, 512, dtype=dtype, device=device)
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < 8 and sum(taken) < BEYOND_DOUBT):
        start = time.perf_counter()
        _ = (x @ w).sum().item()
        taken.append(time.perf_counter() - start)
    return min(taken)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the device on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.is_file():  # the figure of getrusage below is inherited from whoever started this process
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes(device: torch.device) -> int:
    """The memory held now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)


@contextmanager
def one_thread_a_product() -> Iterator[None]:
    """Products run on one core each: for work that runs several at once, and for sums whose bits do not depend on the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def page_out(tensor: torch.Tensor) -> None:
    """Tell the kernel that nobody will look at a tensor soon: what of it is mapped from a file leaves memory. No value is lost.

    Does nothing where the system has no such call (Linux since 5.4 has).
    """
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes - start) // page * page
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if advise is not None and length > 0 and tensor.device.type == "cpu":
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(MADV_PAGEOUT))


def return_freed_memory() -> None:
    """Give memory that was freed, but that the C library keeps for later, back to the system, where it is glibc that does so."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


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


def memory_capacity(device: torch.device) -> int:
    """The memory that there is: of the device on a GPU, of this machine or container on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    total = int(psutil.virtual_memory().total)
    return total if allowed == "max" else min(total, int(allowed))


def zeros_in_large_pages(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of `like`'s type and device; on a CPU in large pages where there are some, and in memory once they are touched."""
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size == 0:
        return like.new_zeros(tuple(shape))
    room = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=like.dtype).view(tuple(shape))
