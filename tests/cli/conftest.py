"""A configuration, and the run that comes of it, for the tests of the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from warm_cli import Finished, WarmCli


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, llama_base: Path, train_file: Path, held_out_file: Path) -> Path:
    path = tmp_path_factory.mktemp("cli-config") / "config.yaml"
    settings = {
        "base": str(llama_base),
        "data": {"train": str(train_file), "evaluation": str(held_out_file)},
        "adapter": {"r": 4},
        "training": {"batch_size": 6, "max_steps": 3, "learning_rate": "1e-2"},
        "output": str(path.parent / "run"),
        "dtype": "float32",
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def trained(cli: WarmCli, config: Path) -> Finished:
    """`twofold train CONFIG --json`, done once."""
    return cli("train", config, "--json")


@pytest.fixture
def adapter(trained: Finished) -> Path:
    return Path(trained.json()["adapter"])


@pytest.fixture
def broken(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be damaged."""
    return Path(shutil.copytree(adapter, tmp_path / "broken"))
