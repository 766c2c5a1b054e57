"""The front door: small, lazy, and shadowed by no submodule."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import twofold


def test_no_exported_name_is_shadowed_by_a_submodule() -> None:
    """Importing `twofold.x` sets the attribute `x` of the package."""
    assert not {module.name for module in pkgutil.iter_modules(twofold.__path__)}.intersection(twofold.__all__)
    assert all(getattr(twofold, name).__module__.startswith("twofold.") for name in twofold.__all__)


def test_every_exported_name_has_a_docstring() -> None:
    assert all(getattr(twofold, name).__doc__ for name in twofold.__all__)


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, twofold, twofold.cli.main; print([m for m in ('torch','transformers','tyro') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
