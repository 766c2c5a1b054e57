"""Every command and every Python block in the documentation runs, in the order in which a reader meets them."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from warm_cli import Finished, WarmCli

from twofold.base.load import DEFAULT_BASE

pytest_plugins = ("tiny_fixtures",)
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_HERE = ("git ", "cd ", "make ", "#")
"""What sets a machine up is tried in a fresh clone, not here."""
STEPS = "--training.max-steps"
ON_A_TINY_BASE = {"combining.md", "distributed.md", "inspecting.md"}
"""Pages whose commands are tried on one: the README's and others are on the real one."""
PROGRAMS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "python": [sys.executable],
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line.strip() for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith(NOT_HERE)]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_commands_run(page: Path, tmp_path: Path, cli: WarmCli, llama_base: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands(page):
        program, *arguments = in_one_step(shlex.split(command, comments=True))
        if page.name in ON_A_TINY_BASE:
            arguments = on_base(arguments, str(llama_base))
        done = cli(*arguments, cwd=tmp_path) if program == "twofold" else cold(program, arguments, tmp_path)
        assert done.code == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def on_base(words: list[str], base: str) -> list[str]:
    """A command on another base than the embedded one."""
    named = [base if word == DEFAULT_BASE else word for word in words]
    return [*named, "--base", base] if {"train", "merge"}.intersection(words) else named


def in_one_step(words: list[str]) -> list[str]:
    """A command that trains, so that it takes one step: what is tried is that commands run, and go together."""
    if "train" not in words:
        return words
    if STEPS in words:
        words = words[: words.index(STEPS)] + words[words.index(STEPS) + 2 :]
    return [*words, STEPS, "1"]


def cold(program: str, arguments: list[str], cwd: Path) -> Finished:
    done = subprocess.run(
        [*PROGRAMS[program], *arguments], cwd=cwd, input="", capture_output=True, text=True, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for i, block in enumerate(blocks(page, "python")):
        script = tmp_path / f"block{i}.py"
        script.write_text(block)
        runpy.run_path(str(script))


SMALL = {"home_intents.py": ["16", "3"], "king_james.py": ["16", "3"], "sentiment.py": ["64", "32"]}
"""Arguments with which an example takes seconds instead of minutes."""
SLOW = {"king_james.py"}
"""That calls what home_intents.py calls."""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(path, id=path.name, marks=[pytest.mark.slow] if path.name in SLOW else [])
        for path in sorted((ROOT / "examples").glob("*.py"))
    ],
)
def test_examples_run(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *SMALL.get(script.name, [])])
    runpy.run_path(str(script))


def test_the_configuration_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "build.py"))["page"]
    assert (ROOT / "docs" / "configuration.md").read_text() == page()


def test_the_interchange_page_is_up_to_date() -> None:
    interchange = runpy.run_path(str(ROOT / "docs" / "build.py"))["interchange"]
    assert (ROOT / "docs" / "interchange.md").read_text() == interchange()


def test_no_path_of_a_machine_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [ROOT / f for f in listed if f.endswith((".py", ".md", ".toml", ".yaml", ".yml", ".j2", "Makefile"))]
    for path in texts:
        found = re.search(r"/(?:home|work|root|tmp)/\w", path.read_text()) if path.is_file() else None
        assert found is None, f"{path} names {found.group() if found else ''}"
