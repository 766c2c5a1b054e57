"""Handling adapters: attaching, loading, switching and saving them, beside PEFT, in one process.

SmolLM2-135M in bfloat16, r = 16 on all 210 linear modules. Both sides do the same: an adapter put on a base, saved (ours is synced
to disk, PEFT's is not), loaded `--adapters` times into one model, and switching among all of those. `--memory N` measures Twofold
alone: N adapters of r = 4, each from a folder of its own, loaded and used in one forward pass; the growth of the process, mapped
pages counted, over the bytes of the folders.

    python benchmarks/handling.py [--adapters 40]
    python benchmarks/handling.py --memory 1000

Prints a markdown table; medians where a thing can be done often.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from twofold.adapter.attach import activate, attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, save_adapter
from twofold.base.load import DEFAULT_BASE, load_base

SWITCHES, SAVES, ATTACHES = 20, 5, 5


def seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(work: Callable[[int], Any], times: int) -> float:
    return statistics.median(seconds(partial(work, i)) for i in range(times))


def base() -> Any:
    return load_base(DEFAULT_BASE, dtype="bfloat16", device="cpu").model


def ours(folder: Path, count: int) -> dict[str, float]:
    """Seconds by what was done."""
    model, attaches = base(), []
    for _ in range(ATTACHES):
        detach(model)
        attaches.append(seconds(lambda: attach(model, LoraConfig(r=16))))
    save = median(lambda _: save_adapter(model, folder / "ours"), SAVES)
    detach(model)
    loads = [seconds(lambda i=i: load_adapter(model, folder / "ours", f"a{i}")) for i in range(count)]
    switch = median(lambda i: activate(model, f"a{i % count}"), SWITCHES)
    return told(attaches, save, loads, switch)


def theirs(folder: Path, count: int) -> dict[str, float]:
    """The same in PEFT."""
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model, attaches, made = base(), [], []
    for _ in range(ATTACHES):
        model = made.pop().unload() if made else model
        attaches.append(seconds(lambda m=model: made.append(peft.get_peft_model(m, config))))
    save = median(lambda _: made[0].save_pretrained(folder / "peft"), SAVES)
    model = made.pop().unload()
    first = seconds(lambda: made.append(peft.PeftModel.from_pretrained(model, folder / "peft", adapter_name="a0")))
    loads = [first, *(seconds(lambda i=i: made[0].load_adapter(folder / "peft", f"a{i}")) for i in range(1, count))]
    switch = median(lambda i: made[0].set_adapter(f"a{i % count}"), SWITCHES)
    return told(attaches, save, loads, switch)


def told(attaches: list[float], save: float, loads: list[float], switch: float) -> dict[str, float]:
    return {
        "attach": statistics.median(attaches),
        "save": save,
        "load the first": loads[0],
        f"load number {len(loads)}": statistics.median(loads[-3:]),
        f"switch among {len(loads)}": switch,
    }


def imported() -> float:
    """Seconds to `import twofold`, over a Python that imports nothing."""
    took = {
        code: median(lambda _, c=code: subprocess.run([sys.executable, "-c", c], check=True), 5)
        for code in ("", "import twofold")
    }
    return took["import twofold"] - took[""]


def memory(count: int, folder: Path) -> float:
    """Growth of the process over the bytes of the folders."""
    model = base()
    attach(model, LoraConfig(r=4))
    save_adapter(model, folder / "a0")
    detach(model)
    for i in range(1, count):
        shutil.copytree(folder / "a0", folder / f"a{i}")
    ids = torch.tensor([[1]])
    with torch.no_grad():
        model(ids)
        before = psutil.Process().memory_info().rss
        for i in range(count):
            load_adapter(model, folder / f"a{i}", f"a{i}")
            model(ids)
    stored = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return (psutil.Process().memory_info().rss - before) / stored


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--memory", type=int)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.memory:
            print(
                f"{given.memory} adapters take {memory(given.memory, Path(folder)):.3f} times the bytes of their files"
            )
            return
        here, there = ours(Path(folder), given.adapters), theirs(Path(folder), given.adapters)
    print("| seconds | Twofold | PEFT | ratio |\n|---|---|---|---|")
    for what, took in here.items():
        print(f"| {what} | {took:.4f} | {there[what]:.4f} | {there[what] / took:.1f} |")
    print(f"\n`import twofold`: {imported():.3f} s")


if __name__ == "__main__":
    main()
