"""The first screen, in a browser: what it shows is what NumPy says, it teaches, and everybody can use it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Locator, Page, Route, expect
from safetensors.torch import load_file
from studio_app import Live, eventually, needed

from twofold.lowrank.factors import LowRank
from twofold.studio.export import export_lesson

pytest_plugins = ("tiny_fixtures",)
AXE = Path(__file__).parents[2] / "studio" / "node_modules" / "axe-core" / "axe.min.js"
PATIENCE = 30_000
"""Milliseconds for which a page is waited for: others may be at work on the machine."""
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@pytest.fixture
def lesson(page: Page, live: Live) -> Page:
    page.set_default_timeout(PATIENCE)
    page.goto(f"{live.url}/#/lesson")
    expect(page.get_by_role("heading", name="LoRA, visualised")).to_be_visible(timeout=PATIENCE)
    return page


@pytest.fixture
def file_page(browser: Any, studio_root: Path, tmp_path: Path) -> Iterator[Page]:
    """The lesson about red/ as a file, opened from the disk by a browser without a network."""
    export_lesson(tmp_path / "lesson.html", studio_root / "red")
    context = browser.new_context(offline=True)
    page = context.new_page()
    errors: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "lesson.html").as_uri())
    yield page
    context.close()
    assert not errors
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def stat(scope: Page | Locator, label: str) -> Locator:
    """The value that stands below a label."""
    page = scope if isinstance(scope, Page) else scope.page
    return scope.locator(".stat").filter(has=page.get_by_text(label, exact=True)).locator(".value").first


def figure(page: Page, section: str) -> Locator:
    """A section's figure, scrolled to and loaded."""
    page.locator(f"#{section}").scroll_into_view_if_needed()
    found = page.locator(f"#{section} .figure").first
    expect(found).to_be_visible(timeout=PATIENCE)
    return found


def slide(slider: Locator, value: int) -> None:
    """Move a slider as a hand does: `fill` sets the value and tells the page."""
    slider.fill(str(value))


def spectrum(adapter: Path, module: str) -> np.ndarray:
    """Singular values of a module's update by dense NumPy, from the file."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double().numpy() for side in "AB")
    return np.linalg.svd(2.0 * b @ a, compute_uv=False)[: a.shape[0]]


def check_truncation(shown: Locator, adapter: Path, module: str) -> None:
    shown.get_by_label("Module").select_option(module)
    values = spectrum(adapter, module)
    for r in (0, 1, 3, 4):
        slide(shown.get_by_label(re.compile("Rank kept")), r)
        energy = (values[:r] ** 2).sum() / (values**2).sum()
        expect(stat(shown, "Energy kept")).to_have_text(f"{100 * energy:.2f}%")
        expect(stat(shown, "Relative error")).to_have_text(f"{100 * np.sqrt(max(0.0, 1 - energy)):.2f}%")


def test_your_adapter_shows_the_energy_that_numpy_finds(lesson: Page, live: Live) -> None:
    shown = figure(lesson, "yours")
    shown.get_by_label("Adapter").select_option("work/red")
    check_truncation(shown, live.root / "red", "model.layers.1.mlp.down_proj")
    check_truncation(shown, live.root / "red", "model.layers.0.self_attn.q_proj")


def test_the_picture_is_the_delta_cut_to_the_rank(lesson: Page, live: Live) -> None:
    """The pixels of the cut update have the signs of NumPy's truncation."""
    module = "model.layers.0.self_attn.q_proj"
    shown = figure(lesson, "yours")
    shown.get_by_label("Adapter").select_option("work/red")
    shown.get_by_label("Module").select_option(module)
    slide(shown.get_by_label(re.compile("Rank kept")), 2)
    expect(shown.get_by_text("a weight of 32 × 32")).to_be_visible()  # the one looked at before is gone
    expect(shown.get_by_role("img", name="The update cut to rank 2")).to_be_visible()
    red_over_blue = """canvas => { const { width, height } = canvas;
      const { data } = canvas.getContext('2d').getImageData(0, 0, width, height);
      return Array.from({ length: height }, (_, i) => Array.from({ length: width }, (_, j) => {
        const at = 4 * (i * width + j); return data[at] - data[at + 2]; })); }"""
    pixels = np.array(
        shown.get_by_role("img", name="The update cut to rank 2").locator("canvas").evaluate(red_over_blue)
    )
    tensors = load_file(live.root / "red" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    u, s, vh = torch.linalg.svd(LowRank(a, b, 2.0).delta())
    cut = ((u[:, :2] * s[:2]) @ vh[:2]).numpy()
    strong = np.abs(cut) > 0.5 * np.abs(cut).mean()
    assert pixels.shape == cut.shape
    assert (np.sign(pixels - np.median(pixels))[strong] == np.sign(cut)[strong]).mean() > 0.98


def test_no_figure_stands_under_another_modules_name(lesson: Page) -> None:
    shown = figure(lesson, "yours")
    shown.get_by_label("Adapter").select_option("work/red")
    energy = stat(shown, "Energy kept")
    expect(energy).to_be_visible()
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    lesson.route("**/api/adapters/module?*", hold)
    shown.get_by_label("Module").select_option("model.layers.0.mlp.gate_proj")
    expect(shown.locator("[aria-busy=true]")).to_have_count(1)
    expect(energy).to_be_hidden()
    eventually(lambda: lesson.wait_for_timeout(20) or held)  # the page goes on meanwhile
    held.pop().fallback()
    expect(energy).to_be_visible()
    expect(shown.get_by_text("model.layers.0.mlp.gate_proj: a weight of 64 × 32")).to_be_visible()


def test_the_figures_at_real_sizes(lesson: Page) -> None:
    sizes = figure(lesson, "saving")
    expect(stat(sizes, "Full update")).to_have_text("16,777,216")
    expect(stat(sizes, "LoRA")).to_have_text("65,536")
    expect(stat(sizes, "Ratio")).to_have_text("256×")
    slide(sizes.get_by_label("Rank, r"), 6)
    expect(stat(sizes, "LoRA")).to_have_text("524,288")


def test_the_rank_is_never_above_r(lesson: Page) -> None:
    shown = figure(lesson, "factors")
    slide(shown.get_by_label("Size of the weight, d"), 3)
    for r in (1, 7, 40, 64):
        slide(shown.get_by_label("Rank, r"), r)
        expect(stat(shown, "Rank of BA, measured")).to_have_text(str(r))
        expect(stat(shown, "B and A together")).to_have_text(f"{2 * 64 * r:,}")


def test_b_leaves_zero_and_two_zeros_never_do(lesson: Page) -> None:
    shown = figure(lesson, "start")
    step = shown.get_by_role("button", name="One step")
    before = stat(shown, "Loss").inner_text()
    expect(stat(shown, "Largest entry of B")).to_have_text("0")
    step.click()
    expect(stat(shown, "Gradient of A")).to_have_text("0")
    expect(stat(shown, "Largest entry of B")).to_have_text("0.020")
    step.click()
    expect(stat(shown, "Gradient of A")).not_to_have_text("0")
    assert float(stat(shown, "Loss").inner_text()) < float(before)
    shown.get_by_label("How it starts").select_option("both zero")
    for _ in range(3):
        step.click()
    expect(stat(shown, "Gradient of B")).to_have_text("0")
    expect(stat(shown, "Loss")).to_have_text(before)


def test_twice_alpha_at_half_the_rate_is_the_same_first_step(lesson: Page) -> None:
    shown = figure(lesson, "scale")
    values = shown.locator(".race .value")
    expect(values.nth(0)).to_have_text(values.nth(1).inner_text())
    first, louder = (float(values.nth(i).inner_text()) for i in (0, 2))
    assert louder == pytest.approx(2 * first, rel=1e-3)


def test_merging_is_measured_and_answers_agree(lesson: Page) -> None:
    shown = figure(lesson, "merge")
    shown.get_by_role("button", name="Measure in this browser").click()
    expect(shown.get_by_role("button", name="Measure again")).to_be_enabled(timeout=PATIENCE)
    assert 0 < float(stat(shown, "Largest difference of the answers").inner_text()) < 1e-4
    assert "ms" in shown.locator(".ways").inner_text()


def test_a_real_update_of_full_fine_tuning_is_cut(lesson: Page) -> None:
    measured = json.loads((AXE.parents[2] / "src" / "lesson" / "measured-full.json").read_text())
    figure(lesson, "why")
    slider = lesson.get_by_label("Directions kept of every update, r")
    expect(slider).to_be_visible(timeout=PATIENCE)
    shown = lesson.locator("#why .figure").filter(has=slider)
    squares = np.square(measured["modules"][0]["values"])
    losses = dict(measured["loss_by_rank"])
    for place, r in ((1, 1), (5, 16)):
        slide(slider, place)
        expect(stat(shown, "Energy kept, this update")).to_have_text(f"{100 * squares[:r].sum() / squares.sum():.1f}%")
        gained = (losses[0] - losses[r]) / (losses[0] - losses[576])
        expect(stat(shown, "Of what training gained")).to_have_text(f"{100 * gained:.1f}%")


def test_answers_are_checked_and_kept(lesson: Page) -> None:
    count = lesson.get_by_role("form", name=re.compile("How many parameters are trained"))
    count.get_by_label("Your answer").fill("262144")
    count.get_by_role("button", name="Check").click()
    expect(count).to_contain_text("one of the two matrices")
    count.get_by_label("Your answer").fill("524,288")
    count.get_by_label("Your answer").press("Enter")
    expect(count).to_contain_text("128 times fewer")
    freeze = lesson.get_by_role("form", name=re.compile("Why does W stay frozen"))
    freeze.get_by_role("button", name=re.compile("forward pass")).click()
    expect(freeze).to_contain_text("It still does")
    freeze.get_by_role("button", name=re.compile("optimiser state")).click()
    expect(freeze).to_contain_text("Right.")
    lesson.reload()
    expect(lesson.get_by_text("5 exercises to go")).to_be_attached(timeout=PATIENCE)
    expect(count).to_contain_text("Solved")


def test_it_is_worked_by_keyboard(lesson: Page) -> None:
    rank = figure(lesson, "factors").get_by_label("Rank, r")
    rank.focus()
    lesson.keyboard.press("ArrowRight")
    expect(rank).to_have_value("9")
    lesson.keyboard.press("Home")
    expect(stat(lesson, "B and A together")).to_have_text("256")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing(lesson: Page, colours: Any) -> None:
    needed("axe-core (npm ci in studio/)", AXE.is_file())
    lesson.emulate_media(color_scheme=colours, reduced_motion="reduce")
    for section in ("start", "scale", "merge", "yours"):
        figure(lesson, section)
    lesson.evaluate(AXE.read_text())
    found = lesson.evaluate("rules => axe.run({ runOnly: rules })", RULES)
    assert [(v["id"], [n["target"] for n in v["nodes"]]) for v in found["violations"]] == []


def test_nothing_is_wider_than_a_phone(lesson: Page) -> None:
    lesson.set_viewport_size({"width": 360, "height": 780})
    for section in ("start", "scale", "merge", "yours"):
        figure(lesson, section)
    assert lesson.evaluate("document.documentElement.scrollWidth") == 360


def test_the_file_works_from_a_disk_without_a_network(file_page: Page, studio_root: Path) -> None:
    expect(file_page.get_by_role("heading", name="LoRA, visualised")).to_be_visible(timeout=PATIENCE)
    check_truncation(figure(file_page, "yours"), studio_root / "red", "model.layers.1.self_attn.v_proj")
    slide(figure(file_page, "factors").get_by_label("Rank, r"), 3)
    expect(stat(file_page, "Rank of BA, measured")).to_have_text("3")
