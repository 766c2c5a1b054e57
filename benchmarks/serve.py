"""Decoding many streams over one base, with adapters row by row, beside others who do it: tokens per second after the prompts.

SmolLM2-135M in bfloat16, r = 16 on all linear layers; prompts of 64 random tokens that differ from the first one on, 64 new
tokens, prefixes not shared. Every side runs in a process of its own, all in one run, on the same prompts; the time of the prompts
is taken off.

    python benchmarks/serve.py [--llama-batched-bench PROGRAM --gguf BASE.gguf --gguf-q8 BASE-q8_0.gguf] [--rounds 3]

llama.cpp is a program of its own (built from the sdist of `llama-cpp-python`, BASE.gguf made by its `convert_hf_to_gguf.py
--outtype bf16`, BASE-q8_0.gguf from that by its `llama-quantize`); it cannot mix adapters in a batch, so it stands beside the rows
without. Prints markdown tables of medians, one for bfloat16 and one for weights in eight bits, and what eight bits do to the
perplexity of held-out text: verses of the World English Bible, in windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from twofold.adapter.attach import attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.base.load import DEFAULT_BASE, load_base, locate
from twofold.data import king_james
from twofold.engine.request import Request
from twofold.engine.scheduler import Made, Scheduler
from twofold.engine.weights import Weights

PROMPT, NEW, ADAPTERS = 64, 64, 32
CASES = {
    "1": (1, 0),
    "1, one adapter": (1, 1),
    "32": (32, 0),
    "32, 8 adapters": (32, 8),
    "32, 28 adapters and 4 bare": (32, 28),
}
"""Streams and adapters; rows beyond a multiple of the adapters are bare in the last case."""
PEFT_CASES = ("32", "32, 8 adapters")


def base() -> Any:
    return load_base(DEFAULT_BASE, dtype="bfloat16", device="cpu").model


def prompts(streams: int, seed: int = 0) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(1000, 40_000) for _ in range(PROMPT)] for _ in range(streams)]


def adapter_of(stream: int, adapters: int) -> str | None:
    """The rows' adapters in turn; with 28 of them the last rows have none."""
    return f"a{stream % adapters}" if adapters and not (adapters > 16 and stream >= adapters) else None


def write_adapters(folder: Path) -> None:
    """Adapters that do something: every B is random."""
    model = base()
    for i in range(ADAPTERS):
        torch.manual_seed(i)
        attach(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        for parameter in (p for n, p in model.named_parameters() if n.endswith(".B")):
            parameter.data.normal_(0, 0.02)
        save_adapter(model, folder / f"a{i}")
        detach(model)


def ours(folder: Path, rounds: int) -> dict[str, list[float]]:
    return _ours(folder, rounds, "taken")


def ours_int8(folder: Path, rounds: int) -> dict[str, list[float]]:
    return _ours(folder, rounds, "int8")


def ours_merged(folder: Path, rounds: int) -> dict[str, list[float]]:
    """One stream, bare and with an adapter that was folded in by the first round."""
    return _ours(folder, rounds, "taken", merge_after=4, cases=("1", "1, one adapter"))


def _ours(
    folder: Path, rounds: int, weights: Weights, merge_after: int | None = None, cases: Sequence[str] = tuple(CASES)
) -> dict[str, list[float]]:
    """Tokens per second of every case, in turn, so that all see the same machine."""
    shape = {"streams": 32, "capacity": PROMPT + NEW, "reuse": False}
    scheduler = Scheduler(base(), **shape, weights=weights, merge_after=merge_after)
    print(scheduler.path, file=sys.stderr)
    for i in range(ADAPTERS):
        scheduler.put_adapter(f"a{i}", folder / f"a{i}")
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 5 if merge_after else rounds + 1):
        for name in cases:
            found[name].append(_decode(scheduler, *CASES[name]))
    print("folded in:", scheduler.merged, file=sys.stderr)
    return {name: speeds[-rounds:] for name, speeds in found.items()}


def _decode(scheduler: Scheduler, streams: int, adapters: int) -> float:
    for i, prompt in enumerate(prompts(streams)):
        name = adapter_of(i, adapters)
        worn = {name: 1.0} if name else {}
        scheduler.add(Request(token_ids=prompt, max_new_tokens=NEW, adapters=worn))
    made, begun, started = 0, time.perf_counter(), time.perf_counter()
    first: set[int] = set()
    while not scheduler.idle:
        events = [e for e in scheduler.step() if isinstance(e, Made)]
        if len(first) == streams:
            made += len(events)
        else:
            first |= {e.stream for e in events}
            started = time.perf_counter()
    ended = time.perf_counter()
    print(f"{streams} prompts, {adapters} adapters: read in {started - begun:.2f} s", file=sys.stderr)
    return made / (ended - started)


def with_transformers(folder: Path, rounds: int) -> dict[str, list[float]]:
    """transformers' own generation, eager."""
    return {name: [_generate(base(), *CASES[name]) for _ in range(rounds)] for name in ("1", "32")}


def with_peft(folder: Path, rounds: int) -> dict[str, list[float]]:
    """PEFT's mixed batches, by adapter_names."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base(), str(folder / "a0"), "a0")
    for i in range(1, 8):
        model.load_adapter(str(folder / f"a{i}"), f"a{i}")
    return {name: [_generate(model.eval(), *CASES[name], peft=True) for _ in range(rounds)] for name in PEFT_CASES}


def _generate(model: Any, streams: int, adapters: int, peft: bool = False) -> float:
    ids = torch.tensor(prompts(streams))
    more = {"adapter_names": [adapter_of(i, adapters) or "__base__" for i in range(streams)]} if peft else {}

    def seconds(new: int) -> float:
        started = time.perf_counter()
        mask = torch.ones_like(ids)
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "min_new_tokens": new}
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **settings, **more)
        return time.perf_counter() - started

    reading = seconds(1)
    return streams * (NEW - 1) / (seconds(NEW) - reading)


def with_llama(program: Path, gguf: Path, rounds: int) -> dict[str, list[float]]:
    """llama.cpp's own benchmark of decoding, which reads the prompts first and times the rest apart."""
    found: dict[str, list[float]] = {"1": [], "32": []}
    command = [
        str(program),
        "-m",
        str(gguf),
        "-c",
        "8192",
        "-b",
        "2048",
        "-ub",
        "512",
        "-npp",
        str(PROMPT),
        "-ntg",
        str(NEW),
    ]
    for _ in range(rounds):
        done = subprocess.run([*command, "-npl", "1,32", "-t", "2"], capture_output=True, text=True, check=True)
        rows = [line.split("|") for line in done.stdout.splitlines() if re.match(r"\|\s*\d", line)]
        for name, row in zip(found, rows, strict=True):
            found[name].append(float(row[8]))
    return found


def perplexities(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Of held-out text: with the weights as they are, and as the engine leaves them in eight bits."""
    loaded = load_base(DEFAULT_BASE, dtype="bfloat16", device="cpu")
    verses = " ".join(str(row["messages"][1]["content"]) for row in king_james.build(10, 1500).evaluation)
    windows = torch.tensor(loaded.tokenizer(verses)["input_ids"][: 24 * 512]).view(-1, 512)
    found = {"bfloat16": [_perplexity(loaded.model, windows)]}
    Scheduler(loaded.model, streams=1, capacity=16, weights="int8")
    return found | {"int8": [_perplexity(loaded.model, windows)]}


@torch.inference_mode()
def _perplexity(model: Any, windows: torch.Tensor) -> float:
    losses = []
    for some in windows.split(4):
        logits = model(some).logits[:, :-1].float().flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, some[:, 1:].flatten()))
    return float(torch.stack(losses).mean().exp())


SIDES = {
    "ours": ours,
    "transformers": with_transformers,
    "peft": with_peft,
    "merged": ours_merged,
    "int8": ours_int8,
    "perplexity": perplexities,
}


def in_own_process(side: str, folder: Path, rounds: int) -> dict[str, list[float]]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Medians, and how many times as fast the first side is as each other."""
    lines = ["| streams | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    first = next(iter(found))
    for case in CASES:
        mine = statistics.median(found[first][case])
        cells = []
        for side, speeds in found.items():
            if case not in speeds:
                cells.append("")
                continue
            theirs = statistics.median(speeds[case])
            cells.append(f"{theirs:.0f}" if side == first else f"{theirs:.0f} ({mine / theirs:.2f}x)")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama-batched-bench", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--gguf-q8", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("bfloat16", "int8"), help="one of the two tables")
    parser.add_argument("--side", choices=sorted(SIDES))
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args.folder, args.rounds)))
        return
    locate(DEFAULT_BASE)
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder))
        if args.only != "int8":
            in_bfloat16(Path(folder), args)
        if args.only != "bfloat16":
            in_int8(Path(folder), args)


def in_bfloat16(folder: Path, args: argparse.Namespace) -> None:
    found = {side: in_own_process(side, folder, args.rounds) for side in ("ours", "transformers", "peft")}
    if args.llama_batched_bench and args.gguf:
        found["llama.cpp"] = with_llama(args.llama_batched_bench, args.gguf, args.rounds)
    found["ours, merged"] = in_own_process("merged", folder, args.rounds)
    found["ours, once more"] = in_own_process("ours", folder, args.rounds)
    print(table(found))
    for case, other in (("32, 8 adapters", "32"), ("32, 28 adapters and 4 bare", "32"), ("1, one adapter", "1")):
        both = [statistics.median(found["ours"][c]) for c in (case, other)]
        print(f"{case}, over no adapter: {both[0] / both[1]:.2f}")


def in_int8(folder: Path, args: argparse.Namespace) -> None:
    found = {"ours, int8": in_own_process("int8", folder, args.rounds)}
    if args.llama_batched_bench and args.gguf_q8:
        found["llama.cpp, q8_0"] = with_llama(args.llama_batched_bench, args.gguf_q8, args.rounds)
    found["ours, bfloat16"] = in_own_process("ours", folder, args.rounds)
    found["ours, int8, once more"] = in_own_process("int8", folder, args.rounds)
    print(table(found))
    (whole,), (rounded,) = in_own_process("perplexity", folder, 1).values()
    print(f"perplexity: {whole:.3f} in bfloat16, {rounded:.3f} in eight bits ({rounded / whole - 1:+.2%})")


if __name__ == "__main__":
    main()
