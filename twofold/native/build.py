"""The compiled kernels: built once for this processor with the C++ compiler that is here, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

from twofold.atomic import new_file
from twofold.downloads import cache_folder
from twofold.errors import RunError

FLAGS = ("-O2", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
COMPILERS = ("c++", "g++", "clang++")
TAKES_AT_MOST = 300
"""Seconds that compiling may take."""


class NotBuilt(Exception):
    """Why there are no compiled kernels here; PyTorch's own operations do the same, slower."""


@lru_cache
def library(name: str = "kernels") -> ctypes.CDLL:
    """The compiled kernels of one source file beside this one.

    Raises:
        NotBuilt: switched off (`TWOFOLD_NATIVE=0`), no compiler, or one that fails.
    """
    if os.environ.get("TWOFOLD_NATIVE") == "0":
        raise NotBuilt("TWOFOLD_NATIVE=0 switches them off")
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise NotBuilt(f"there is no C++ compiler ({', '.join(COMPILERS)})")
    source = Path(__file__).with_name(f"{name}.cpp")
    path = cache_folder() / "native" / f"{name}-{_digest(compiler, source)}.so"
    if not path.exists():
        _compile(compiler, source, path)
    try:
        torch.get_num_threads()  # PyTorch's own OpenMP is loaded by now, and is found in place of a second one
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuilt(f"what the compiler made cannot be loaded ({error})") from error


def built() -> bool:
    """Whether there are compiled kernels here."""
    try:
        library()
    except NotBuilt:
        return False
    return True


def _compile(compiler: str, source: Path, path: Path) -> None:
    try:
        with new_file(path) as temporary:
            command = [compiler, *FLAGS, "-o", str(temporary), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TAKES_AT_MOST, check=False)
            if done.returncode:
                raise NotBuilt(f"{compiler} fails: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
    except (OSError, RunError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"they cannot be compiled here ({error})") from error


def _digest(compiler: str, source: Path) -> str:
    """Of whatever the compiled code depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    headers = (h.read_text() for h in sorted(source.parent.glob("*.hpp")))
    parts = (source.read_text(), *headers, *FLAGS, version, platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the processor can do, since code compiled for another may crash: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
