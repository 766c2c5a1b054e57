"""Takes the pictures of docs/studio from a real run: trains SmolLM2 on home commands from the page, then opens each screen.

python studio/screenshots.py        needs the built page (make studio), Debian's chromium and the `dev` extra; some minutes
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from twofold.data import home_intents

OUTPUT = Path(__file__).parents[1] / "docs" / "studio"
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
PATIENCE = 3_600_000
COMMAND = "turn on the lamp in the kitchen"


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


def train(page: Page, name: str, rank: str, steps: str) -> None:
    """Start a run from the page, and wait for its end."""
    page.goto(f"{page.url.split('#')[0]}#/train/new")
    page.get_by_text("More settings").click()
    fields = {
        "Name of the run": name,
        "Training data": "work/commands/train.jsonl",
        "Held-out data (optional)": "work/commands/evaluation.jsonl",
        "Rank r": rank,
        "Learning rate": "2e-3",
        "Batch size": "8",
        "Evaluate every … steps": "8",
        "Spectra every … steps": "1",
        "At most so many steps": steps,
    }
    for label, value in fields.items():
        page.get_by_label(label, exact=True).fill(value)
    if name == "home-r16":
        page.get_by_role("button", name="Check the run").click()
        expect(page.get_by_text("on this machine, estimated")).to_be_visible(timeout=PATIENCE)
        taken(page, "new-run")
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_text("finished", exact=True).first).to_be_visible(timeout=PATIENCE)


def taken(page: Page, name: str, *, whole: bool = False) -> None:
    page.wait_for_timeout(600)
    page.screenshot(path=OUTPUT / f"{name}.png", full_page=whole)
    print(f"{name}.png")


def run(page: Page, address: str) -> None:
    """Every screen, once there is something to see on it."""
    page.goto(f"{address}#/plan")
    expect(page.get_by_text("Where it fits")).to_be_visible(timeout=PATIENCE)
    page.get_by_role("group", name="Memory of LoRA").get_by_role("button", name="activations").hover()
    taken(page, "plan")
    train(page, "home-r16", "16", "32")
    train(page, "home-r4", "4", "32")
    page.goto(f"{address}#/train?runs=home-r16,home-r4")
    expect(page.get_by_text("Spectra as they grow")).to_be_visible(timeout=PATIENCE)
    taken(page, "train", whole=True)
    red, blue = "work/runs/home-r16/adapter", "work/runs/home-r4/adapter"
    for tab, ready in {"look": "‖ΔW‖ / ‖W‖", "compare": "How alike", "combine": "energy lost"}.items():
        page.goto(f"{address}#/inspect?adapter={red}&with={blue}&tab={tab}")
        expect(page.get_by_text(ready).first).to_be_visible(timeout=PATIENCE)
        taken(page, f"inspect-{tab}")
    page.goto(f"{address}#/play?adapter={red}")
    page.get_by_role("button", name="Load the base").click()
    expect(page.get_by_text("Ready.")).to_be_visible(timeout=PATIENCE)
    page.get_by_role("button", name="Add an adapter").click()
    page.get_by_text("How it is drawn").click()
    page.get_by_label("System message").fill(home_intents.SYSTEM)
    page.get_by_text("How it is drawn").click()
    page.get_by_label("Ask all of them").fill(COMMAND)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible(timeout=PATIENCE)
    page.locator("article").nth(1).locator("[data-token]").nth(4).hover()
    taken(page, "play")


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "work"
        home_intents.write(root / "commands", 256, 60)
        with studio(root) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
            run(browser.new_page(viewport={"width": 1200, "height": 800}), address)
            browser.close()


if __name__ == "__main__":
    main()
