"""What is built and packed: the page within its budget, carried by the wheel; the front end's own tests and checks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from studio_app import needed

from twofold.studio import export
from twofold.studio.app import PAGE, is_built
from twofold.studio.pictures import module_picture

ROOT = Path(__file__).parents[2]
FRONT = ROOT / "studio"


@pytest.fixture
def built() -> Path:
    needed("the built page (make studio)", is_built())
    return PAGE


@pytest.fixture
def node() -> None:
    needed("Node, and npm ci in studio/", shutil.which("npm") is not None and (FRONT / "node_modules").is_dir())


def test_the_wheel_carries_the_page_and_the_sample(built: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    page = {f"twofold/studio/page/{p.relative_to(built)}" for p in built.rglob("*") if p.is_file()}
    assert "twofold/studio/page/index.html" in page
    assert page <= names
    assert any(re.fullmatch(r"twofold/studio/sample/[^/]+/adapter_model\.safetensors", n) for n in names)
    assert not any(n.startswith("studio/") or "node_modules" in n for n in names)


def test_the_page_is_small_and_asks_nobody(built: Path, node: None) -> None:
    subprocess.run(["node", "budget.mjs"], cwd=FRONT, check=True)


@pytest.mark.parametrize("script", ["test", "check"])
def test_the_front_end_passes_its_own(node: None, script: str) -> None:
    found = subprocess.run(["npm", "run", script], cwd=FRONT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_lock_names_no_registry() -> None:
    assert "resolved" not in (FRONT / "package-lock.json").read_text()


def test_the_lesson_is_written_about_an_adapter(built: Path, tmp_path: Path) -> None:
    export.export_lesson(tmp_path / "lesson.html", None)
    page = (tmp_path / "lesson.html").read_text()
    found = re.search(r'<script type="application/json" id="your-adapter">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    told = json.loads(found[1])
    assert [m["name"] for m in told["modules"]] == told["adapter"]["modules"]
    from twofold.adapter.files import open_adapter

    files = open_adapter(next(p for p in export.SAMPLE_FOLDER.iterdir() if p.is_dir()))
    first = told["modules"][0]
    assert first["energy"] == pytest.approx(module_picture(files, first["name"])["energy"], rel=1e-4)
    assert "src=" not in page.replace("src=data:", "")
