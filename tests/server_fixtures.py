"""One served tiny Llama for the tests that only ask it things."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_server import Running, running, served, write_adapter

from twofold.recipes.serve import ServeConfig


@pytest.fixture(scope="session")
def adapters(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters, of which nobody but `live`'s tests may change anything; outside of the root lies another."""
    base = served(llama_base).base
    folder = tmp_path_factory.mktemp("serving")
    for seed, name in enumerate(("red", "green", "blue")):
        write_adapter(base, folder / "root" / name, seed)
    write_adapter(base, folder / "root" / "large", 9, r=16)
    write_adapter(base, folder / "outside", 10)
    return folder / "root"


@pytest.fixture
def root(adapters: Path, tmp_path: Path) -> Path:
    """A root of one's own with red and green in it."""
    for name in ("red", "green"):
        shutil.copytree(adapters / name, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture(scope="session")
def live(llama_base: Path, adapters: Path) -> Iterator[Running]:
    """A server over those."""
    config = ServeConfig(adapters=adapters, max_rank=8, poll_seconds=0.1)
    with running(served(llama_base), config) as found:
        yield found
