"""What the tests of kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from twofold.native import training


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever falls back to PyTorch's operations fails."""

    def refused(run: Callable[..., Any]) -> Callable[..., Any]:
        raise AssertionError(f"{run.__name__} was left to PyTorch")

    monkeypatch.setattr(training, "original", refused)
