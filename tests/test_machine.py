"""What is said about this machine."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
import torch

from twofold.machine import memory_capacity


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells no other figure")
def test_a_peak_is_not_inherited_from_the_parent() -> None:
    child = "import torch, twofold.machine as m; print(m.peak_memory_bytes(torch.device('cpu')))"
    parent = (
        "import subprocess, sys; held = bytes(900_000_000);"
        f"print(subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True, check=True).stdout)"
    )
    found = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True).stdout
    assert 50_000_000 < int(found) < 800_000_000


def test_the_capacity_is_no_more_than_the_machine_has() -> None:
    assert 10**8 < memory_capacity(torch.device("cpu")) <= psutil.virtual_memory().total
