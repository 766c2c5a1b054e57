"""The chat screen: lanes side by side over one base, each saying what its adapter says at its scale."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect
from screens import accessible, everywhere, fresh
from studio_app import Live, eventually, open_studio

from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.generate import GenerationConfig, answers

pytest_plugins = ("tiny_fixtures",)
ASKED = "colour of the hat 2?"
TOKENS = 16


@pytest.fixture(scope="module")
def play(studio_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A Studio of its own, whose base is open."""
    root = tmp_path_factory.mktemp("play-screen") / "work"
    shutil.copytree(studio_root, root, ignore=shutil.ignore_patterns("runs", "uploads", "adapters"))
    with open_studio(root) as found:
        found.made("/api/play/open", {"base": "work/tiny-llama", "dtype": "float32"})
        eventually(lambda: found.get("/api/play").json()["state"] == "ready")
        yield found


@pytest.fixture
def lanes(page: Page, play: Live) -> Page:
    """The base, red and green side by side."""
    page.goto(f"{play.url}/#/play")
    for i, name in enumerate(("red", "green"), 2):
        page.get_by_role("button", name="Add an adapter").click()
        page.get_by_role("group", name=f"Lane {i}").get_by_role("combobox").select_option(f"work/{name}")
    page.get_by_text("How it is drawn").click()
    page.get_by_role("slider", name="Most tokens").press("Home")
    return page


def ask(page: Page) -> None:
    page.get_by_label("Ask all of them").fill(ASKED)
    page.get_by_label("Ask all of them").press("Enter")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def lane(page: Page, name: str) -> Locator:
    return page.get_by_role("article", name=f"Answer of {name}").last


def text(page: Page, name: str) -> str:
    return "".join(lane(page, name).locator("[data-token]").all_text_contents())


def alone(root: Path, *adapters: str) -> str:
    """What the command line answers."""
    base = load_with_adapters(str(root / "tiny-llama"), list(adapters), "float32", "cpu")
    return answers(base, [[{"role": "user", "content": ASKED}]], GenerationConfig(max_new_tokens=TOKENS))[0]


def test_each_lane_says_what_its_adapter_says_alone(lanes: Page, play: Live) -> None:
    ask(lanes)
    assert text(lanes, "base") == alone(play.root)
    for name in ("red", "green"):
        assert text(lanes, name) == alone(play.root, str(play.root / name))


def test_scale_zero_is_the_base_and_nothing_is_loaded_again(lanes: Page, play: Live) -> None:
    lanes.get_by_role("group", name="Lane 2").get_by_role("slider", name="Scale").press("Home")
    ask(lanes)
    assert text(lanes, "red × 0.00") == text(lanes, "base")
    expect(lane(lanes, "red × 0.00")).to_contain_text(re.compile(r"^\s*red × 0.00\s+0 of \d+ tokens differ"))
    assert lane(lanes, "green").locator(".differs").count() > 0
    lanes.get_by_role("group", name="Lane 2").get_by_role("slider", name="Scale").press("End")
    assert play.get("/api/play").json()["state"] == "ready"
    lanes.get_by_role("button", name="Begin anew").click()
    ask(lanes)
    loud = alone(play.root, f"{play.root / 'red'}:2")
    assert text(lanes, "red × 2.00") == loud != text(lanes, "base")


def test_probabilities_are_there_for_mouse_and_keyboard(lanes: Page) -> None:
    ask(lanes)
    tokens = lane(lanes, "red").locator("[data-token]")
    tokens.first.hover()
    likely = lane(lanes, "red").get_by_role("listitem")
    expect(likely).to_have_count(5)
    shares = [float(t.split()[-1].rstrip("%")) for t in likely.all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.1
    tokens.first.focus()
    lanes.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()


def test_the_screen_is_accessible_everywhere(page: Page, play: Live) -> None:
    for _ in everywhere(page):
        fresh(page, f"{play.url}/#/play?adapter=work/red")
        expect(page.get_by_text("Ready.")).to_be_visible()
        ask(page)
        accessible(page)
