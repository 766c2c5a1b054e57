"""The cases that the page's maths is held to (`npm test`) are what Python says today."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

FRONT = Path(__file__).parents[2] / "studio"


def same(found: Any, expected: Any, place: str = "cases") -> None:
    """Equal in shape, and in every number but for rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            same(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for i, value in enumerate(expected):
            same(found[i], value, f"{place}[{i}]")
    else:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9), place


def test_the_cases_are_what_python_says() -> None:
    made = runpy.run_path(str(FRONT / "make_cases.py"))["cases"]()
    same(json.loads((FRONT / "src" / "maths" / "cases.json").read_text()), json.loads(json.dumps(made)))
