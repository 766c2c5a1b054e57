"""How fast the studio's first screen is: first paint under 1 s, and 60 frames a second while heat maps of d = 512 form.

python benchmarks/studio_page.py [LOADS]          (after `make studio`; needs playwright and a Chromium)

The page is served by a studio of its own on loopback and shown by a headless Chromium without a GPU, which is the slow way.
Each load is by a fresh browser profile. Then the rank slider of the first figure is dragged from 1 to 64 and back at d = 512
with a mouse, and the time between frames is taken by the page itself, beside the time that its own work takes in each.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from twofold.studio.app import is_built

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
D = 512
FRAMES = """() => {
  const seen = { gaps: [], work: [] };
  const ask = window.requestAnimationFrame.bind(window);
  window.requestAnimationFrame = (call) => ask((now) => {
    const start = performance.now();
    call(now);
    seen.work.push(performance.now() - start);
  });
  let last = 0;
  const watch = (now) => { if (last) seen.gaps.push(now - last); last = now; ask(watch); };
  ask(watch);
  window.__frames = seen;
}"""


def main() -> None:
    loads = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as root, serving(root) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        paints = [first_paint(browser, url) for _ in range(loads)]
        frames = dragged(browser, url)
        browser.close()
    result = {"first_paint_ms": spread(paints), **frames}
    print(json.dumps(result, indent=1))


@contextmanager
def serving(root: str) -> Iterator[str]:
    """A studio on a free port."""
    command = [sys.executable, "-m", "twofold", "studio", "--port", "0", "--no-open", "--root", root]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield address_in(server)
    finally:
        server.terminate()
        server.wait()


def address_in(server: subprocess.Popen[str]) -> str:
    """Where it says that it listens; what it said instead, if it ended."""
    assert server.stdout
    said = []
    for line in server.stdout:
        if found := re.search(r"http://\S+", line):
            return found[0]
        said.append(line)
    sys.exit(f"the studio ended: {''.join(said)}")


def first_paint(browser: Browser, url: str) -> float:
    """Milliseconds from the start of navigation to the first contents on the screen."""
    page = browser.new_context().new_page()
    page.goto(url)
    page.wait_for_selector("h1")
    page.wait_for_timeout(300)
    found = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    page.context.close()
    return float(found)


def dragged(browser: Browser, url: str) -> dict[str, Any]:
    page = browser.new_context(viewport={"width": 1440, "height": 1000}).new_page()
    page.goto(url)
    size = page.get_by_label("Size of the weight, d")
    size.focus()
    page.keyboard.press("End")
    page.get_by_label("B times A, 512 rows").wait_for()
    page.wait_for_timeout(500)
    page.evaluate(FRAMES)
    drag(page)
    seen = page.evaluate("window.__frames")
    gaps, work = seen["gaps"], seen["work"]
    return {
        "d": D,
        "frames": len(gaps),
        "frames_per_second": round(1000 * len(gaps) / sum(gaps), 1),
        "frame_ms": spread(gaps),
        "frames_over_25_ms": sum(gap > 25 for gap in gaps),
        "own_work_ms": spread(work),
    }


def drag(page: Page) -> None:
    """The handle from one end to the other and back, in small steps."""
    box = page.get_by_label("Rank, r").first.bounding_box()
    assert box
    y, left, width = box["y"] + box["height"] / 2, box["x"] + 10, box["width"] - 20
    page.mouse.move(left, y)
    page.mouse.down()
    for step in [*range(0, 101, 2), *range(100, -1, -2)]:
        page.mouse.move(left + width * step / 100, y)
        page.wait_for_timeout(16)
    page.mouse.up()


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 1),
        "p95": round(ordered[math.ceil(0.95 * len(ordered)) - 1], 1),
        "most": round(ordered[-1], 1),
    }


if __name__ == "__main__":
    if not Path(CHROMIUM).exists():
        sys.exit(f"no Chromium at {CHROMIUM}; set CHROMIUM to one")
    if not is_built():
        sys.exit("the page is not built; run `make studio`")
    main()
