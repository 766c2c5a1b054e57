"""How long streams wait for their next token while adapters are loaded: a server's steps as its clients see them.

As `benchmarks/serve.py`: SmolLM2-135M in bfloat16, r = 16 on all linear layers. 32 clients stream answers with 8 adapters among
them; once all have begun, stretches without and with loads take turns. A load is `/v1/load_lora_adapter` with a name and content
that the server does not have in memory, one after the other without a break. A step is a burst of tokens over all streams, so that
a token whose text is held back until it is certain counts as no pause.

    python benchmarks/pauses.py [--rounds 3] [--seconds 6]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
from serve import ADAPTERS, adapter_of, prompts, write_adapters
from serve_http import BASE_NAME, Server, free_port, openai, running

from twofold.base.load import DEFAULT_BASE, locate

STREAMS, WORN = 32, 8
TOKENS = 1800
"""Of each answer; the streams are left when everything was measured."""
BURST = 0.01
"""Seconds: tokens that come closer to one another are of one step."""


class Stretch(NamedTuple):
    """A time with loads or without."""

    begun: float
    ended: float
    loads: int


async def stream(client: httpx.AsyncClient, i: int, came: list[float], begun: set[int]) -> None:
    """One answer, and when its tokens came."""
    route, body = openai(prompts(STREAMS)[i], adapter_of(i, WORN))
    async with client.stream("POST", route, json=body | {"max_tokens": TOKENS, "stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if "error" in (event := json.loads(line.removeprefix("data: "))):
                raise SystemExit(event)
            came.append(time.perf_counter())
            begun.add(i)


async def load(client: httpx.AsyncClient, numbers: Iterator[int], seconds: float) -> int:
    """Adapters, one after the other, for so long; how many."""
    until, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        i = next(numbers)
        body = {"lora_name": f"new{i}", "lora_path": f"store/n{i}"}
        (await client.post("/v1/load_lora_adapter", json=body)).raise_for_status()
        count += 1
    return count


async def measured(url: str, rounds: int, seconds: float) -> tuple[list[float], list[Stretch]]:
    """When tokens came, and the stretches without and with loads in turn."""
    came, begun, stretches, numbers = list[float](), set[int](), list[Stretch](), itertools.count()
    limits = httpx.Limits(max_connections=STREAMS + 1)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        streams = [asyncio.create_task(stream(client, i, came, begun)) for i in range(STREAMS)]
        while len(begun) < STREAMS:
            await asyncio.sleep(0.1)
        await load(client, numbers, 0.1)
        for with_loads in [False, True] * rounds:
            await asyncio.sleep(0.5)
            start, loads = time.perf_counter(), 0
            if with_loads:
                loads = await load(client, numbers, seconds)
            else:
                await asyncio.sleep(seconds)
            stretches.append(Stretch(start, time.perf_counter(), loads))
        for one in streams:
            if one.done():
                raise SystemExit("the answers ended before everything was measured; ask for fewer seconds")
            one.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return came, stretches


def write_root(folder: Path, count: int) -> None:
    """Eight adapters to be worn, and many to be loaded, whose configs differ so that each has a content of its own."""
    write_adapters(folder)
    (folder / "store").mkdir()
    for i in range(count):
        source, target = folder / f"a{i % ADAPTERS}", folder / "store" / f"n{i}"
        target.mkdir()
        os.link(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
        config = json.loads((source / "adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps(config | {"revision": str(i)}))


def row(name: str, came: list[float], stretches: list[Stretch]) -> str:
    """Median, 99 % and the worst of the times between two steps, in milliseconds."""
    times = sorted(came)
    starts = [b for a, b in itertools.pairwise(times) if b - a > BURST]
    steps = itertools.pairwise(starts)
    inside = sorted(1e3 * (b - a) for a, b in steps if any(s.begun <= a and b <= s.ended for s in stretches))
    loads, cut = sum(s.loads for s in stretches), inside[int(0.99 * len(inside))]
    return f"| {name} | {loads} | {len(inside)} | {statistics.median(inside):.1f} | {cut:.1f} | {inside[-1]:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6)
    args = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        write_root(Path(name), 200)
        command = [sys.executable, "-m", "twofold", "serve", "--base", str(locate(DEFAULT_BASE)), "--name", BASE_NAME]
        command += ["--dtype", "bfloat16", "--adapters", name, "--port", str(port)]
        with running(Server(command, openai, ()), port):
            came, stretches = asyncio.run(measured(f"http://127.0.0.1:{port}", args.rounds, args.seconds))
    print("| | loads | steps | median ms | 99 % | worst |\n|---|---|---|---|---|---|")
    print(row("without loads", came, [s for s in stretches if not s.loads]))
    print(row("with loads", came, [s for s in stretches if s.loads]))


if __name__ == "__main__":
    main()
