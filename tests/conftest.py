"""What every test shares. Nothing of twofold is imported here: pytest's shape checks must see its modules first."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

settings.register_profile("twofold", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("twofold")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take minutes begin, so that no process waits for another's last one."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
