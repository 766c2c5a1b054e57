"""The planning screen: its figures are the recipe's, its formulas are there for mouse and keyboard."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from screens import accessible, everywhere, field, fresh
from studio_app import Live

from twofold.recipes.plan import PlanSettings, compare

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def planned(page: Page, live: Live) -> Page:
    page.goto(f"{live.url}/#/plan")
    field(page, "Base model").fill("work/tiny-llama")
    expect(page.get_by_role("row", name=re.compile("parameters that learn"))).to_be_visible()
    return page


def test_the_figures_are_those_of_the_recipe(planned: Page, llama_base: Path) -> None:
    settings = PlanSettings(base=str(llama_base), r=32)
    planned.get_by_role("slider", name="Rank r").press("ArrowRight")  # from 16 to 32
    found = compare(settings)
    learn = [f"{found[m]['parameters']['trainable']:,}" for m in ("full", "lora", "qlora")]
    row = planned.get_by_role("row", name=re.compile("parameters that learn"))
    expect(row.get_by_role("cell")).to_have_text(learn)
    expected = found["lora"]["memory"]["total"]["expected"]
    shown = planned.get_by_role("row", name=re.compile("memory, expected")).get_by_role("cell").nth(1).inner_text()
    number, unit = shown.split()
    # The recipe counts what this process holds, the server what its own does, so the two differ by libraries loaded since.
    assert float(number) * {"MB": 1e6, "GB": 1e9}[unit] == pytest.approx(expected, rel=0.25)


def test_each_terms_formula_is_shown_by_mouse_and_by_keyboard(planned: Page) -> None:
    bar = planned.get_by_role("group", name="Memory of LoRA, term by term")
    bar.get_by_role("button", name=re.compile("^optimizer")).hover()
    expect(planned.get_by_text("8 · P_train", exact=True)).to_be_visible()
    expect(planned.get_by_text("parameters that train")).to_be_visible()
    first = bar.get_by_role("button").first
    first.focus()
    expect(planned.get_by_text("q · P_linear")).to_be_visible()
    first.press("ArrowRight")
    expect(planned.get_by_text("4 · P_train", exact=True)).to_be_visible()


def test_it_says_where_a_large_model_fits(page: Page, live: Live) -> None:
    page.goto(f"{live.url}/#/plan")
    field(page, "Base model").fill("llama-3.1-8b")
    row = page.get_by_role("row", name=re.compile("^24 GB"))
    expect(row.get_by_role("cell").nth(0)).to_have_text("✕ no", timeout=60_000)


def test_a_base_that_is_not_there_is_told(page: Page, live: Live) -> None:
    page.goto(f"{live.url}/#/plan")
    field(page, "Base model").fill("work/nothing-here")
    expect(page.get_by_role("alert")).to_contain_text("nothing-here")


def test_the_screen_is_accessible_everywhere(page: Page, live: Live) -> None:
    for _ in everywhere(page):
        fresh(page, f"{live.url}/#/plan")
        expect(page.get_by_text("Where it fits")).to_be_visible(timeout=60_000)
        page.get_by_role("button", name=re.compile("^activations")).first.focus()
        accessible(page)
