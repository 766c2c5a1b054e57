"""A Studio with data, a tiny base and two adapters below its root; and a browser that reaches nothing but this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studio_app import Live, needed, open_studio

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def studio_root(
    llama_base: Path, train_file: Path, held_out_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`work/`: data.jsonl, held_out.jsonl, tiny-llama/, red/ and green/."""
    from tiny_server import served, write_adapter

    root = tmp_path_factory.mktemp("studio") / "work"
    shutil.copytree(llama_base, root / "tiny-llama")
    shutil.copy(train_file, root / "data.jsonl")
    shutil.copy(held_out_file, root / "held_out.jsonl")
    base = served(llama_base).base
    for seed, name in enumerate(("red", "green")):
        write_adapter(base, root / name, seed)
    return root


@pytest.fixture(scope="session")
def live(studio_root: Path) -> Iterator[Live]:
    """One Studio for all tests of a worker; runs and files that a test makes have names of its own."""
    with open_studio(studio_root) as found:
        yield found


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium under Playwright."""
    needed("Debian's chromium (apt-get install chromium)", CHROMIUM is not None)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page; requests to other machines fail, and an error on the page fails the test."""
    from twofold.studio.app import is_built

    needed("the built page (make studio)", is_built())
    context = browser.new_context()
    outside: list[str] = []
    errors: list[str] = []

    def judge(route: Any) -> None:
        if route.request.url.startswith(("http://127.0.0.1:", "http://localhost:", "data:", "blob:")):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    context.route("**/*", judge)
    found = context.new_page()
    found.on("pageerror", lambda error: errors.append(str(error)))
    yield found
    context.close()
    assert not outside, f"the page asked other machines: {outside}"
    assert not errors, f"errors on the page: {errors}"
