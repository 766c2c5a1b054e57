"""The inspection screen: what it shows is what the recipes say, and its buttons do what they do."""

from __future__ import annotations

import re

import pytest
import torch
from playwright.sync_api import Page, expect
from screens import accessible, everywhere, field, fresh
from studio_app import Live

from twofold.adapter.files import open_adapter
from twofold.adapter.updates import updates_of
from twofold.recipes.combine import combine
from twofold.recipes.inspect import compare, inspect_adapter

pytest_plugins = ("tiny_fixtures",)
MODULE = "model.layers.1.self_attn.o_proj"


def opened(page: Page, live: Live, tab: str = "look") -> None:
    page.goto(f"{live.url}/#/inspect?adapter=work/red&tab={tab}")


def cell(page: Page, label: str = "layer 1 · o_proj") -> str:
    return page.get_by_role("button", name=re.compile(f"^{label}:")).get_attribute("aria-label") or ""


def test_the_map_shows_sizes_beside_the_base(page: Page, live: Live) -> None:
    opened(page, live)
    page.get_by_label("Beside the base").select_option("work/tiny-llama")
    expect(page.get_by_label("Colour shows")).to_contain_text("relative size")
    page.get_by_label("Colour shows").select_option("relative")
    report = inspect_adapter(live.root / "red", str(live.root / "tiny-llama"))
    found = next(m for m in report.modules if m.name == MODULE)
    assert found.beside_base is not None
    assert cell(page) == f"layer 1 · o_proj: {100 * found.beside_base.relative_norm:.2f}%"


def test_arrows_walk_the_map_down_to_a_spectrum(page: Page, live: Live) -> None:
    opened(page, live)
    page.get_by_role("button", name=re.compile("^layer 0 · gate_proj")).click()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("region", name="layer 0 · up_proj")).to_be_visible()
    page.get_by_text("All its singular values").click()
    update = updates_of(open_adapter(live.root / "red"))["model.layers.0.mlp.up_proj"]
    exact = torch.linalg.svdvals(update.delta().double())
    shown = page.get_by_role("group", name="Singular values").get_by_role("row")
    expect(shown).to_have_count(update.rank + 1)
    first = float(shown.nth(1).get_by_role("cell").nth(1).inner_text())
    assert first == pytest.approx(float(exact[0]), rel=1e-3)


def test_two_adapters_are_compared(page: Page, live: Live) -> None:
    opened(page, live, "compare")
    page.get_by_label("With", exact=True).select_option("work/green")
    found = compare(live.root / "red", live.root / "green")
    one = next(m for m in found.modules if m.name == MODULE)
    page.get_by_role("button", name=re.compile("^layer 1 · o_proj:")).click()
    value = float(cell(page).split(": ")[1].replace("−", "-"))
    assert value == pytest.approx(one.cosine, abs=5e-3)
    grid = page.get_by_role("table", name="Outputs (left vectors)")
    last = grid.get_by_role("row").last.get_by_role("cell").last.inner_text()
    assert float(last) == pytest.approx(one.output_similarity[-1][-1], abs=0.01)


def test_a_combination_is_previewed_and_written(page: Page, live: Live) -> None:
    opened(page, live, "combine")
    page.get_by_label("Rank of what comes out").fill("3")
    parts = {live.root / "red": 0.5, live.root / "green": 0.55}
    page.get_by_role("slider", name="green").press("ArrowRight")  # from 0.50
    lost = combine(parts, None, method="svd", r=3)["lost"]
    expect(page.get_by_role("region", name="What comes out")).to_contain_text(f"{100 * lost:.2f}%")
    field(page, "Name of the new adapter").fill("red-and-green")
    page.get_by_role("button", name="Combine and write").click()
    expect(page.get_by_role("link", name="work/adapters/red-and-green")).to_be_visible()
    exact = combine(parts, live.root / "by-hand", method="svd", r=3)
    made = updates_of(open_adapter(live.root / "adapters" / "red-and-green"))
    for name, update in updates_of(open_adapter(live.root / "by-hand")).items():
        torch.testing.assert_close(made[name].delta(), update.delta())
    assert exact["r"] == 3


def test_two_that_were_compared_are_offered_for_combining(page: Page, live: Live) -> None:
    combine({live.root / "green": 1.0}, live.root / "yellow", method="svd", r=2)
    page.goto(f"{live.url}/#/inspect?adapter=work/red&with=work/yellow&tab=combine")
    expect(page.get_by_role("slider", name="yellow")).to_be_visible()
    expect(page.get_by_role("slider", name="green")).to_have_count(0)


def test_a_smaller_rank_is_chosen_by_what_it_keeps(page: Page, live: Live) -> None:
    opened(page, live, "resize")
    page.get_by_role("slider", name="New rank").press("Home")
    squares = [
        torch.linalg.svdvals(u.delta().double()) ** 2 for u in updates_of(open_adapter(live.root / "red")).values()
    ]
    kept = sum(float(s[0]) for s in squares) / sum(float(s.sum()) for s in squares)
    shown = page.locator(".stat").filter(has=page.get_by_text("energy kept", exact=True))
    expect(shown.locator(".value")).to_have_text(f"{100 * kept:.2f}%")
    field(page, "Name of the new adapter").fill("red-small")
    page.get_by_role("button", name="Write it at rank 1").click()
    expect(page.get_by_text("from rank 4 to 1")).to_be_visible()
    assert open_adapter(live.root / "adapters" / "red-small").config.r == 1


def test_a_name_that_leads_elsewhere_is_refused(page: Page, live: Live) -> None:
    opened(page, live, "resize")
    field(page, "Name of the new adapter").fill("../elsewhere")
    page.get_by_role("button", name=re.compile("Write it")).click()
    expect(page.get_by_role("alert")).to_contain_text("cannot name an adapter")


def test_the_screen_is_accessible_everywhere(page: Page, live: Live) -> None:
    ready = {"look": "Findings", "compare": "How alike", "combine": "energy lost", "resize": "energy kept"}
    for _ in everywhere(page):
        for tab, text in ready.items():
            fresh(page, f"{live.url}/#/inspect?adapter=work/red&tab={tab}")
            expect(page.get_by_text(text).first).to_be_visible()
            accessible(page)
