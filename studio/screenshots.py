"""Takes the pictures of docs/studio from real runs: trains SmolLM2 on home commands from the page, then opens each screen.

python studio/screenshots.py [ROOT [NAME ...]]

Needs the built page (make studio), Debian's chromium and the `dev` extra; some minutes. With ROOT, a folder, the data and the
runs are kept there, and those that lie there already are not trained again; with names, only those pictures are taken.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from twofold.data import home_intents

OUTPUT = Path(__file__).parents[1] / "docs" / "studio"
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
PATIENCE = 3_600_000
COMMAND = "turn on the lamp in the kitchen"
WIDE: ViewportSize = {"width": 1280, "height": 860}
PHONE: ViewportSize = {"width": 390, "height": 844}
RUNS = {"home-r16": "16", "home-r4": "4"}
BOTH = "adapter=work/runs/home-r16/adapter&with=work/runs/home-r4/adapter"


def nothing(page: Page) -> None:
    """The screen as it opens."""


def grown(page: Page) -> None:
    """The lesson's small training, at its end."""
    figure = page.locator("#start .figure")
    figure.get_by_role("button", name="Train").click()
    expect(figure.get_by_text("step 160 of 160")).to_be_visible(timeout=PATIENCE)
    page.locator("#start").evaluate("e => scrollTo(0, e.offsetTop - 20)")


def cut(page: Page) -> None:
    """The spectrum of a real update."""
    slider = page.get_by_label("Directions kept of every update, r")
    slider.evaluate("e => scrollTo(0, e.getBoundingClientRect().top + scrollY - 280)")


def described(page: Page) -> None:
    """A run that is about to be started, with its data and what it will cost."""
    filled(page, "home-r8", "8")
    page.get_by_role("button", name="Check the run").click()
    expect(page.get_by_text("on this machine, estimated")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("Example 1:")).to_be_visible(timeout=PATIENCE)
    page.mouse.wheel(0, -5000)


def laid_over(page: Page) -> None:
    expect(page.get_by_text("Where these runs differ")).to_be_visible(timeout=PATIENCE)
    page.get_by_role("region", name="home-r4").evaluate("e => scrollTo(0, e.offsetTop + e.offsetHeight - 60)")


def spectra(page: Page) -> None:
    page.get_by_role("heading", name="Spectra as they grow").evaluate("e => scrollTo(0, e.offsetTop - 90)")


def chatted(page: Page) -> None:
    """The base and both adapters asked the same, with the pointer over a token."""
    if page.get_by_role("button", name="Load the base").count():
        page.get_by_role("button", name="Load the base").click()
    expect(page.get_by_text("Ready.")).to_be_visible(timeout=PATIENCE)
    page.get_by_role("button", name="Add an adapter").click()
    page.get_by_role("group", name="Lane 3").get_by_role("combobox").select_option("work/runs/home-r4/adapter")
    page.get_by_text("How it is drawn").click()
    page.get_by_label("System message").fill(home_intents.SYSTEM)
    page.get_by_text("How it is drawn").click()
    page.get_by_label("Ask all of them").fill(COMMAND)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible(timeout=PATIENCE)
    page.locator("article").nth(1).locator("[data-token]").nth(4).hover()


class Shot(NamedTuple):
    """One picture: where, what must be there first, and what is done before it is taken."""

    name: str
    at: str
    ready: str
    act: Callable[[Page], None] = nothing
    size: ViewportSize = WIDE
    scheme: Literal["light", "dark"] = "light"


SHOTS = (
    Shot("lesson", "lesson", "LoRA, visualised"),
    Shot("lesson-start", "lesson/start", "what it should learn", grown, scheme="dark"),
    Shot("lesson-why", "lesson/why", "Directions kept of every update", cut, size={"width": 1280, "height": 980}),
    Shot("lesson-yours", "lesson/yours", "Energy kept", size={"width": 1280, "height": 980}),
    Shot("lesson-phone", "lesson", "LoRA, visualised", size=PHONE, scheme="dark"),
    Shot("plan", "plan", "Where it fits"),
    Shot("new-run", "train/new", "Base and data", described, {"width": 1440, "height": 1000}),
    Shot("train", "train?runs=home-r16,home-r4", "Spectra as they grow", laid_over, {"width": 1280, "height": 1000}),
    Shot("train-spectra", "train?runs=home-r16", "Spectra as they grow", spectra, scheme="dark"),
    Shot("train-phone", "train?runs=home-r16", "Spectra as they grow", size=PHONE),
    Shot("inspect-look", f"inspect?{BOTH}&tab=look", "‖ΔW‖ / ‖W‖", size={"width": 1280, "height": 980}),
    Shot("inspect-compare", f"inspect?{BOTH}&tab=compare", "How alike", scheme="dark"),
    Shot("inspect-combine", f"inspect?{BOTH}&tab=combine", "energy lost", size={"width": 1280, "height": 980}),
    Shot("inspect-resize", f"inspect?{BOTH}&tab=resize", "energy kept"),
    Shot("play", "play?adapter=work/runs/home-r16/adapter", "Base and adapters", chatted),
)


@contextmanager
def studio(root: Path) -> Iterator[str]:
    """The address of a Studio over a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "twofold", "studio", "--no-open", "--port", str(port), "--root", str(root)]
    process = subprocess.Popen(command)
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


def filled(page: Page, name: str, rank: str) -> None:
    """The form of a new run."""
    fields = {
        "Name of the run": name,
        "Training data": "work/commands/train.jsonl",
        "Held-out data (optional)": "work/commands/evaluation.jsonl",
        "Rank r": rank,
        "Learning rate": "2e-3",
        "Batch size": "8",
        "Evaluate every … steps": "8",
        "Spectra every … steps": "1",
    }
    for label, value in fields.items():
        page.get_by_label(label, exact=True).and_(page.locator("input")).fill(value)


def train(browser: Browser, address: str, name: str, rank: str) -> None:
    """Start a run from the page, and wait for its end."""
    page = browser.new_page()
    page.goto(f"{address}#/train/new")
    filled(page, name, rank)
    page.get_by_role("button", name="Start training").click()
    card = page.get_by_role("region", name=name)
    expect(card.get_by_text("finished", exact=True)).to_be_visible(timeout=PATIENCE)
    page.close()


def taken(browser: Browser, address: str, shot: Shot) -> None:
    context = browser.new_context(viewport=shot.size, color_scheme=shot.scheme, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{address}#/{shot.at}")
    expect(page.get_by_text(shot.ready).first).to_be_attached(timeout=PATIENCE)
    page.wait_for_timeout(1500)
    shot.act(page)
    page.wait_for_timeout(600)
    page.screenshot(path=OUTPUT / f"{shot.name}.png")
    print(f"{shot.name}.png", flush=True)
    context.close()


def run(root: Path, names: list[str]) -> None:
    """Data and runs where there are none yet, then every picture."""
    chosen = [shot for shot in SHOTS if not names or shot.name in names]
    if not (root / "commands").exists():
        home_intents.write(root / "commands", 256, 60)
    with studio(root) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
        for name, rank in RUNS.items():
            if any(name in shot.at for shot in chosen) and not (root / "runs" / name / "adapter").exists():
                train(browser, address, name, rank)
        for shot in chosen:
            taken(browser, address, shot)
        browser.close()


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 1:
        return run(Path(sys.argv[1]), sys.argv[2:])
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "work", [])


if __name__ == "__main__":
    main()
