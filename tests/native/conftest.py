"""What the tests of kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from twofold.functional.loss import hidden_gradient, logits_of
from twofold.native import training
from twofold.replaceable import original

MAY_STAY = (logits_of, hidden_gradient)
"""The head's products are left to PyTorch where its own are the better ones."""


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever falls back to PyTorch's operations fails."""

    def refused(run: Callable[..., Any]) -> Callable[..., Any]:
        if run in MAY_STAY:
            return original(run)
        raise AssertionError(f"{run.__name__} was left to PyTorch")

    monkeypatch.setattr(training, "original", refused)
