"""The training screen in a browser, against a real server and real runs of a tiny base."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from screens import PHONE, WIDE, Alone, accessible, alone_at, everywhere, field, fresh, make_run, start
from studio_app import Live, eventually
from tiny_base import chats, write_jsonl

from twofold.recipes.preview import preview
from twofold.recipes.settings import read_config

pytest_plugins = ("tiny_fixtures",)
STEPS = {"max_steps": "400", "batch_size": "4", "epochs": "1000", "evaluate_every": "50", "checkpoint_every": "20"}


def fill(page: Page, live: Live | Alone, name: str, **settings: str) -> None:
    """The form of a new run, over the tiny base."""
    page.goto(f"{live.url}/#/train/new")
    field(page, "Base model").fill("work/tiny-llama")
    field(page, "Name of the run").fill(name)
    field(page, "Training data").fill("work/data.jsonl")
    field(page, "Held-out data (optional)").fill("work/held_out.jsonl")
    page.get_by_text("More settings").click()
    labels = {
        "max_steps": "At most so many steps",
        "batch_size": "Batch size",
        "epochs": "Epochs",
        "evaluate_every": "Evaluate every … steps",
        "checkpoint_every": "Checkpoint every … steps",
        "r": "Rank r",
    }
    for key, value in settings.items():
        field(page, labels[key]).fill(value)


def points(page: Page) -> int:
    """How many steps the loss curve says it has."""
    curve = page.get_by_role("slider", name=re.compile("Mean loss"))
    said = (curve.get_attribute("aria-label") or "") if curve.count() else ""  # there is none before the first step
    found = re.search(r"([\d,]+) points", said)
    return int(found[1].replace(",", "")) if found else 0


def recorded(live: Live, name: str, kind: str = "step") -> list[dict[str, Any]]:
    lines = (live.root / "runs" / name / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def test_data_is_shown_token_by_token_as_the_model_will_see_it(page: Page, live: Live, tmp_path: Path) -> None:
    fill(page, live, "looked-at")
    mine = write_jsonl(tmp_path / "my data.jsonl", chats(5))
    page.get_by_label("File for Training data").set_input_files(mine)
    expect(page.get_by_text("my data.jsonl is here")).to_be_visible()
    expect(page.get_by_text("messages", exact=True)).to_be_visible()

    config = tmp_path / "config.yaml"
    config.write_text(f"base: {live.root / 'tiny-llama'}\ndata: {{train: '{mine}'}}\n")
    shown = preview(read_config(config), 4)["samples"]
    for i, sample in enumerate(shown):
        example = page.get_by_role("group", name=f"Example {i + 1}, token by token")
        expect(example.locator(".token")).to_have_count(len(sample))
        expect(example.locator("mark .token")).to_have_count(sum(supervised for _, supervised in sample))


def test_nothing_moves_under_the_pointer_when_the_data_comes(page: Page, live: Live) -> None:
    for size in (PHONE, WIDE):
        page.set_viewport_size(size)  # type: ignore[arg-type]
        page.goto(f"{live.url}/#/train/new")
        field(page, "Training data").fill("")
        expect(page.get_by_text("Choose training data, and its first examples")).to_be_visible()
        top = "e => e.getBoundingClientRect().top + scrollY"
        button = page.get_by_role("button", name="Start training")
        before = button.evaluate(top)
        field(page, "Base model").fill("work/tiny-llama")
        field(page, "Training data").fill("work/data.jsonl")
        expect(page.get_by_role("group", name="Example 1, token by token")).to_be_visible()
        assert button.evaluate(top) == before


def test_two_tabs_see_the_same_and_do_not_quarrel(page: Page, live: Live) -> None:
    other = page.context.new_page()
    fill(page, live, "in-two-tabs", **STEPS)
    start(page)
    card = page.get_by_role("region", name="in-two-tabs")
    eventually(lambda: points(page) > 5)
    other.goto(f"{live.url}/#/train?runs=in-two-tabs")
    same = other.get_by_role("region", name="in-two-tabs")
    same.get_by_role("button", name="Stop").click()
    for shown in (card, same):
        expect(shown.get_by_text("stopped", exact=True)).to_be_visible()
    assert points(page) == points(other) == recorded(live, "in-two-tabs")[-1]["step"]
    for shown in (card, same):  # the second finds nothing to click, or is told that it came too late
        shown.get_by_role("button", name="Resume").evaluate_all("buttons => buttons.forEach((b) => b.click())")
    for shown in (card, same):
        expect(shown.get_by_text("finished", exact=True)).to_be_visible()
    assert [e["step"] for e in recorded(live, "in-two-tabs")] == list(range(1, 401))


def test_a_run_is_started_followed_through_a_reload_stopped_and_resumed(page: Page, live: Live) -> None:
    fill(page, live, "followed", **STEPS)
    page.get_by_role("button", name="Check the run").click()
    expect(page.get_by_text("on this machine, estimated")).to_be_visible(timeout=60_000)
    start(page)

    card = page.get_by_role("region", name="followed")
    eventually(lambda: points(page) > 30)
    page.reload()
    eventually(lambda: points(page) > 30)  # all of them, not only those since
    expect(page.get_by_role("slider", name=re.compile("Mean loss"))).to_have_attribute("aria-valuemin", "1")
    expect(page.get_by_text("Spectra as they grow")).to_be_visible()

    card.get_by_role("button", name="Stop").click()
    expect(card.get_by_text("stopped", exact=True)).to_be_visible(timeout=60_000)
    stopped = recorded(live, "followed")[-1]["step"]
    eventually(lambda: points(page) == stopped)
    assert stopped < 400

    card.get_by_role("button", name="Resume").click()
    expect(card.get_by_text("finished", exact=True)).to_be_visible(timeout=120_000)
    eventually(lambda: points(page) == 400)
    steps = recorded(live, "followed")
    assert [e["step"] for e in steps] == list(range(1, 401))
    expect(card.get_by_text("Proved:")).to_be_visible()


def test_the_spectrum_of_a_module_grows_from_nothing(page: Page, live: Live) -> None:
    make_run(live, "grown", {"training": {"max_steps": 20, "epochs": 9, "spectrum_every": 2}})
    page.goto(f"{live.url}/#/train?runs=grown")
    spectra = recorded(live, "grown", "spectrum")
    module = "model.layers.1.self_attn.v_proj"
    page.get_by_role("button", name=re.compile("^layer 1 · v_proj")).click()
    growth = page.get_by_role("slider", name=re.compile("Singular values over the run"))
    growth.press("End")
    largest = max(spectra[-1]["modules"][module])
    expect(growth).to_have_attribute("aria-valuetext", re.compile(rf"step {spectra[-1]['step']}: .*{largest:.2g}"[:14]))
    norms = [sum(v * v for v in e["modules"][module]) for e in spectra]
    assert norms[0] < norms[-1]


def test_runs_are_laid_over_each_other_with_what_differs(page: Page, live: Live) -> None:
    make_run(live, "small", {"adapter": {"r": 2}, "training": {"max_steps": 6}})
    make_run(live, "large", {"adapter": {"r": 8}, "training": {"max_steps": 6}})
    page.goto(f"{live.url}/#/train?runs=small")
    page.get_by_label("Show large").check()
    row = page.get_by_role("row", name=re.compile("adapter.r"))
    expect(row.get_by_role("cell")).to_have_text(["2", "8"])
    expect(page.get_by_role("row", name=re.compile("training.seed"))).to_have_count(0)
    loss = page.get_by_role("slider", name=re.compile("Mean loss"))
    loss.press("End")
    last = [recorded(live, name)[-1]["loss"] for name in ("small", "large")]
    expect(loss).to_have_attribute("aria-valuetext", f"step 6: small {last[0]:.3g}, large {last[1]:.3g}")


def test_a_killed_training_is_said_and_gone_on_with(page: Page, live: Live) -> None:
    fill(page, live, "killed-while-followed", **STEPS)
    start(page)
    card = page.get_by_role("region", name="killed-while-followed")
    eventually(lambda: points(page) > 25)
    noted = json.loads((live.root / "runs" / "killed-while-followed" / "studio" / "process.json").read_text())
    os.kill(noted["pid"], signal.SIGKILL)
    expect(card.get_by_role("alert")).to_contain_text("killed", timeout=30_000)
    card.get_by_role("button", name="Resume").click()
    expect(card.get_by_text("finished", exact=True)).to_be_visible(timeout=120_000)
    eventually(lambda: points(page) == 400)


def test_a_killed_server_is_said_and_recovered_from(page: Page, live: Live, studio_root: Path) -> None:
    with alone_at(studio_root) as studio:
        fill(page, studio, "alone", **STEPS)
        start(page)
        eventually(lambda: points(page) > 5)
        studio.kill()
        expect(page.get_by_text("Connection lost")).to_be_visible(timeout=30_000)
        studio.start()
        expect(page.get_by_text("Connection lost")).to_be_hidden(timeout=30_000)
        expect(page.get_by_text("No connection")).to_be_hidden(timeout=30_000)
        card = page.get_by_role("region", name="alone")
        expect(card.get_by_text("finished", exact=True)).to_be_visible(timeout=120_000)
        eventually(lambda: points(page) == 400)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("weights.pkl", b"\x80\x04K\x01.", "jsonl"),
        ("data.jsonl", b"\x80\x04K\x01.", "data.jsonl"),
        ("../../outside.jsonl", b"no JSON at all\n", "outside.jsonl"),
    ],
)
def test_bad_uploads_get_a_sentence(page: Page, live: Live, name: str, content: bytes, said: str) -> None:
    page.goto(f"{live.url}/#/train/new")
    page.get_by_label("File for Training data").set_input_files(
        {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    )
    refused = page.get_by_role("alert")
    expect(refused).to_contain_text(said)
    assert "Traceback" not in refused.inner_text()


def test_a_file_over_the_limit_is_refused_before_it_is_sent(page: Page, live: Live, tmp_path: Path) -> None:
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(2 * 2**30)
    page.goto(f"{live.url}/#/train/new")
    expect(field(page, "Base model")).to_have_attribute("placeholder", "smollm2-135m-instruct")
    page.get_by_label("File for Training data").set_input_files(large)
    expect(page.get_by_role("alert")).to_contain_text("large.jsonl has 2.15 GB; at most 1.07 GB can be uploaded")


def test_a_mistake_in_the_settings_is_told_in_the_servers_words(page: Page, live: Live) -> None:
    fill(page, live, "mistaken", batch_size="0")
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("alert")).to_contain_text("batch_size is 0 but must be at least 1")


def test_the_screen_is_accessible_everywhere(page: Page, live: Live) -> None:
    make_run(live, "shown", {"training": {"max_steps": 10, "spectrum_every": 2, "evaluate_every": 5}})
    for _ in everywhere(page):
        fresh(page, f"{live.url}/#/train?runs=shown")
        expect(page.get_by_text("Spectra as they grow")).to_be_visible()
        accessible(page)
        fresh(page, f"{live.url}/#/train/new")
        field(page, "Training data").fill("work/data.jsonl")
        expect(page.get_by_text("Marked tokens")).to_be_visible()
        accessible(page)
