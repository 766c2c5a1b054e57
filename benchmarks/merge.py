"""Merging from disk to disk beside copying the folder and beside PEFT, each in processes of its own.

A Llama of random bfloat16 weights in files of half a gigabyte and an adapter of r = 16 on all its linear modules are made in a
temporary folder. Each side starts with the base in the page cache and ends when what it wrote is on the disk: `cp -r` and `sync` of
the copied files; `twofold merge --no-verify`; `from_pretrained`, PEFT's `merge_and_unload`, `save_pretrained` and the same `sync`.
Memory is the largest anonymous memory that was seen (what is mapped from a file can be dropped at any time and does not count). The
proof is then made apart, and so is `twofold merge --check`.

    python benchmarks/merge.py [--gigabytes 3] [--times 3]

Prints a markdown table of medians.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.base.load import DEFAULT_BASE, locate

SHARD_BYTES = 500_000_000
HIDDEN, WIDE, VOCABULARY = 2048, 8192, 49152
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(model, "adapter").merge_and_unload()
merged.save_pretrained("out", max_shard_size="500MB")
AutoTokenizer.from_pretrained("base").save_pretrained("out")
"""


class Took(NamedTuple):
    seconds: float
    anonymous: int


def make(folder: Path, gigabytes: float) -> None:
    """The base and the adapter; no more than a file of it is in memory."""
    layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE)
    layers = round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=layers,
        num_attention_heads=16,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(locate(DEFAULT_BASE)).save_pretrained(folder / "base")
    write_shards(folder / "base", {n: tuple(p.shape) for n, p in model.named_parameters()})
    torch.manual_seed(0)
    adapted = model.to_empty(device="cpu")  # untouched memory, which takes none
    attach(adapted, LoraConfig(r=16))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(adapted, folder / "adapter")


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    random = torch.randn(1 << 24).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    places: dict[str, int] = {}
    held = 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        if held and held + 2 * count > SHARD_BYTES:
            save_file(shards[-1], folder / f"{len(shards)}", metadata={"format": "pt"})
            shards[-1] = {}
            shards.append({})
            held = 0
        shards[-1][name] = random.repeat(-(-count // len(random)))[:count].clone().view(shape)
        places[name] = len(shards)
        held += 2 * count
    save_file(shards[-1], folder / f"{len(shards)}", metadata={"format": "pt"})
    names = {i: f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)}
    for i, name in names.items():
        (folder / str(i)).rename(folder / name)
    index = {"metadata": {}, "weight_map": {k: names[i] for k, i in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def measured(command: list[str], folder: Path) -> Took:
    """A command and what it held; `out` is on the disk when it ends, and is taken away."""
    started = time.perf_counter()
    running = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    largest = 0
    while running.poll() is None:
        try:
            status = Path(f"/proc/{running.pid}/status").read_text()
        except OSError:
            break
        largest = max(largest, 1024 * sum(map(int, re.findall(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE))))
        time.sleep(0.005)
    if running.wait():
        raise SystemExit(f"{command} failed")
    return Took(time.perf_counter() - started, largest)


def said(command: list[str], folder: Path) -> dict[str, Any]:
    done = subprocess.run([*command, "--json"], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def sides() -> dict[str, list[str]]:
    sync = "sync out/*"
    return {
        "`cp -r` and `sync`": ["sh", "-c", f"cp -r base out && {sync}"],
        "`twofold merge --no-verify`": [*MERGE, "-o", "out", "--no-verify"],
        "PEFT: load, merge, save, `sync`": ["sh", "-c", f"exec {sys.executable} peft_side.py"],
    }


MERGE = [sys.executable, "-m", "twofold", "merge", "--base", "base", "--adapter", "adapter"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--times", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        compare(Path(name), asked.gigabytes, asked.times)


def compare(folder: Path, gigabytes: float, times: int) -> None:
    make(folder, gigabytes)
    sync = "\nimport subprocess, glob; subprocess.run(['sync', *glob.glob('out/*')], check=True)\n"
    (folder / "peft_side.py").write_text(PEFT + sync)
    subprocess.run("sync base/*; cat base/* > /dev/null", shell=True, cwd=folder, check=True)
    took: dict[str, list[Took]] = {}
    for turn in range(times):
        for side, command in sides().items():
            if not side.startswith("PEFT") or turn == 0:
                took.setdefault(side, []).append(measured(command, folder))
                shutil.rmtree(folder / "out")
    base = statistics.median(t.seconds for t in took["`cp -r` and `sync`"])
    print("| | seconds | over `cp` | largest anonymous memory, MB |\n|---|---|---|---|")
    for side, runs in took.items():
        seconds = statistics.median(t.seconds for t in runs)
        print(f"| {side} | {seconds:.1f} | {seconds / base:.2f} | {max(t.anonymous for t in runs) / 1e6:.0f} |")
    told = said([*MERGE, "-o", "out"], folder)
    writing, model = told["writing_seconds"], told["seconds"] - told["writing_seconds"]
    print(f"\nOf `twofold merge`, {writing:.1f} s go from file to file, {writing / base:.2f} of `cp`;")
    print(f"the rest starts Python, torch and transformers ({model:.1f} s of it the model without values).")
    print(f"The proof alone: {told['proof_seconds']:.1f} s, {told['proof_peak_memory_bytes'] / 1e6:.0f} MB resident.")
    checked = measured([*MERGE, "--check", "out"], folder)
    print(f"`--check`: {checked.seconds:.1f} s, {checked.anonymous / 1e6:.0f} MB anonymous.")


if __name__ == "__main__":
    main()
