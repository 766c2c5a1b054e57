"""The real thing in a browser: SmolLM2 trained from the page, followed through a reload, stopped, resumed, and looked into."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect
from screens import field, start
from studio_app import SECONDS, Live, eventually

pytest_plugins = ("tiny_fixtures",)
PATIENCE = 1000 * SECONDS
SETTINGS = {
    "Batch size": "2",
    "At most so many steps": "12",
    "Rank r": "2",
    "Epochs": "9",
    "Spectra every … steps": "4",
    "Longest example, tokens": "64",
}


@pytest.mark.slow
def test_smollm2_is_trained_from_the_page(page: Page, live: Live) -> None:
    page.goto(f"{live.url}/#/train/new")
    field(page, "Base model").fill("smollm2-135m-instruct")
    field(page, "Name of the run").fill("smollm2")
    field(page, "Training data").fill("work/data.jsonl")
    page.get_by_text("More settings").click()
    for label, value in SETTINGS.items():
        field(page, label).fill(value)
    start(page)

    card = page.get_by_role("region", name="smollm2")
    expect(card).to_be_visible(timeout=PATIENCE)
    eventually(lambda: page.wait_for_timeout(100) or len(live.steps("smollm2")) >= 2)  # the page goes on meanwhile
    page.reload()
    expect(page.get_by_role("slider", name=re.compile("Mean loss"))).to_be_visible(timeout=PATIENCE)
    card.get_by_role("button", name="Stop").click()
    expect(card.get_by_text("stopped", exact=True)).to_be_visible(timeout=PATIENCE)
    stopped = live.steps("smollm2")[-1]
    assert 2 <= stopped < 12

    card.get_by_role("button", name="Resume").click()
    expect(card.get_by_text("finished", exact=True)).to_be_visible(timeout=PATIENCE)
    assert live.steps("smollm2") == list(range(1, 13))
    details = live.get("/api/runs/smollm2").json()
    assert details["report"]["verification"]["passed"]
    assert details["report"]["base_unchanged"]
    inspected = live.made("/api/inspect", {"adapter": details["adapter"]})
    assert len(inspected["modules"]) == 210
