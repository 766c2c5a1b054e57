"""The arrows of the house point down: a file imports only from a lower floor or from its own room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "twofold"
FLOORS = {
    **dict.fromkeys(("errors", "events", "garbage"), -2),
    **dict.fromkeys(("config", "atomic", "machine", "world", "replaceable"), -1),
    "downloads": 0,
    **dict.fromkeys(("lowrank", "functional", "quant", "tensorfile"), 1),
    **dict.fromkeys(("layers", "native"), 2),
    "base": 3,
    "adapter": 4,
    **dict.fromkeys(("data", "training", "planning", "inspection", "merging", "engine"), 5),
    "recipes": 6,
    **dict.fromkeys(("server", "peft"), 7),
    "studio": 8,
    "cli": 9,
}
FRONT_DOOR = {"__init__", "__main__"}


def room(module: str) -> str:
    return module.split(".")[1]


def arrows() -> list[tuple[str, str]]:
    """Every import in the package, those inside functions too, as (importing module, imported module)."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(["twofold", *path.relative_to(PACKAGE).with_suffix("").parts])
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{module} imports relatively"
                names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "twofold" else [node.module]
            found += [(module, name) for name in names if name.startswith("twofold.")]
    return found


@pytest.mark.parametrize(("importing", "imported"), sorted(set(arrows())))
def test_arrows_point_down(importing: str, imported: str) -> None:
    source, target = room(importing), room(imported)
    if source in FRONT_DOOR or source == target:
        return
    assert FLOORS[target] < FLOORS[source], f"{importing} imports {imported}, which lies on its own floor or above"


def test_every_room_has_a_floor() -> None:
    rooms = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert rooms - FRONT_DOOR - {"__pycache__"} <= set(FLOORS)


def test_files_and_functions_stay_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, f"{path} is longer than 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = (node.end_lineno or 0) - node.body[0].lineno
                assert body <= 60, f"{path}: {node.name} is {body} lines long"
