"""What the tests of the screens share."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect
from studio_app import Live, eventually

from twofold.config import build
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import train

AXE = Path(__file__).parents[2] / "studio" / "node_modules" / "axe-core" / "axe.min.js"
expect.set_options(timeout=60_000)  # others may be at work on the machine
PHONE, WIDE = {"width": 390, "height": 844}, {"width": 1440, "height": 900}


def field(page: Page, label: str) -> Locator:
    """A line of text by its label."""
    return page.get_by_role("textbox", name=label, exact=True).or_(page.get_by_role("combobox", name=label, exact=True))


def fresh(page: Page, address: str) -> None:
    """Open an address that may differ only behind the `#`."""
    page.goto("about:blank")
    page.goto(address)


def start(page: Page) -> None:
    """Start what is filled in, and come to where it is followed."""
    page.get_by_role("button", name="Start training").click()
    expect(page).to_have_url(re.compile("runs="))


def everywhere(page: Page) -> Iterator[None]:
    """On a phone and on a wide screen, light and dark."""
    for size in (PHONE, WIDE):
        for scheme in ("light", "dark"):
            page.set_viewport_size(size)  # type: ignore[arg-type]
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
            yield


def accessible(page: Page) -> None:
    """Axe finds nothing, and nothing is wider than the screen."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run()")
    told = [(v["id"], [n["html"] for n in v["nodes"]]) for v in found["violations"]]
    assert told == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@dataclass
class Alone:
    """A Studio in a process of its own, which can be killed and started again at the same address."""

    port: int
    root: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "twofold", "studio", "--port", str(self.port), "--root", str(self.root)]
        self.process = subprocess.Popen([*command, "--no-open"], stderr=subprocess.DEVNULL)
        eventually(self._answers)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def alone_at(root: Path) -> Iterator[Alone]:
    """A Studio of its own over a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = Alone(port, root)
    found.start()
    try:
        yield found
    finally:
        found.kill()


def make_run(live: Live, name: str, settings: dict[str, Any]) -> Path:
    """A run as the command line leaves it, in the folder that Studio looks into."""
    home: Path = live.root
    output = home / "runs" / name
    if not output.exists():
        values = {
            "base": str(home / "tiny-llama"),
            "data": {"train": str(home / "data.jsonl"), "evaluation": str(home / "held_out.jsonl")},
            "dtype": "float32",
            "device": "cpu",
            "output": str(output),
            **settings,
            "training": {"batch_size": 6, "learning_rate": 0.02, "epochs": 9, **settings.get("training", {})},
            "adapter": {"r": 4, **settings.get("adapter", {})},
        }
        train(build(TrainConfig, values, source=name))
    return output
