"""A thousand adapters over one base, asked for as people ask (Zipf), with room for a hundred: speed, and memory over time.

As `benchmarks/serve_http.py`: SmolLM2-135M in bfloat16, r = 16 on all linear layers, prompts of 64 random tokens, 64 new tokens, 32
clients that ask again as soon as they are answered. The thousand names lie over a few contents, hard-linked, because a server
keeps them apart by name and hash alike. The side that they are held against is the same stream of requests folded onto as many
names as there is room for, all in memory before the clock starts.

    python benchmarks/soak.py [--seconds 40] [--adapters 1000] [--resident 100]
    python benchmarks/soak.py --only-memory --seconds 600
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from serve import ADAPTERS, prompts, write_adapters
from serve_http import BASE_NAME, Server, free_port, openai, running

from twofold.base.load import DEFAULT_BASE, locate

CLIENTS = 32
ROWS = 10
"""Of the table of memory."""


@dataclass
class Side:
    """Who is asked, and what came of it."""

    name: str
    chosen: Callable[[int], str]
    warm: list[str]


@dataclass
class Row:
    """One stretch of time."""

    seconds: float
    tokens: int
    answers: int
    memory: int
    loads: int
    evictions: int


def zipf(adapters: int, seed: int) -> Iterator[int]:
    """Ranks from 0 on; the next one is as likely as its place is high."""
    dice = random.Random(seed)
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(adapters)))
    while True:
        yield dice.choices(range(adapters), cum_weights=weights)[0]


def write_root(folder: Path, adapters: int) -> int:
    """Many names over a few contents; the bytes of one."""
    write_adapters(folder / "contents")
    for i in range(adapters):
        (folder / "root" / f"n{i}").mkdir(parents=True)
        for file in (folder / "contents" / f"a{i % ADAPTERS}").iterdir():
            os.link(file, folder / "root" / f"n{i}" / file.name)
    return sum(f.stat().st_size for f in (folder / "root" / "n0").iterdir())


def server_of(root: Path, megabytes: float, port: int) -> Server:
    command = [sys.executable, "-m", "twofold", "serve", "--base", str(locate(DEFAULT_BASE)), "--name", BASE_NAME]
    command += [
        "--dtype",
        "bfloat16",
        "--adapters",
        str(root),
        "--adapter-memory-mb",
        f"{megabytes:.1f}",
        "--port",
        str(port),
    ]
    return Server(command, openai, ())


def state(url: str) -> tuple[int, int]:
    """Loads and evictions so far."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text)
    found = {s.name: int(s.value) for f in families for s in f.samples if s.name.startswith("twofold:adapter_")}
    return found["twofold:adapter_loads_total"], found["twofold:adapter_evictions_total"]


async def asked(url: str, side: Side, seconds: float, rows: int, seed: int) -> list[Row]:
    """All clients for so long; a row for each stretch."""
    ranks, numbers = zipf(1000, seed), itertools.count()
    tokens = answers = 0
    begun = time.perf_counter()
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one() -> None:
            nonlocal tokens, answers
            while time.perf_counter() - begun < seconds:
                route, body = openai(prompts(1, seed * 10**6 + next(numbers))[0], side.chosen(next(ranks)))
                found = await client.post(route, json=body)
                found.raise_for_status()
                tokens += found.json()["usage"]["completion_tokens"]
                answers += 1

        clients = asyncio.gather(*(one() for _ in range(CLIENTS)))
        found = []
        for i in range(rows):
            await asyncio.sleep(max(0.0, begun + seconds * (i + 1) / rows - time.perf_counter()))
            loads, evictions = await asyncio.to_thread(state, url)
            found.append(Row(time.perf_counter() - begun, tokens, answers, memory_of(url), loads, evictions))
        await clients
    return found


def memory_of(url: str) -> int:
    """Bytes that the process behind a port of loopback has in memory of its own, without what is mapped from files."""
    port = int(url.rpartition(":")[2])
    mine = psutil.Process().children(recursive=True)
    (server,) = [p for p in mine if any(c.laddr and c.laddr.port == port for c in p.net_connections("inet"))]
    known = server.memory_info()
    return int(known.rss - known.shared)


def measured(side: Side, root: Path, megabytes: float, seconds: float, rows: int) -> list[Row]:
    port = free_port()
    url, server = f"http://127.0.0.1:{port}", server_of(root, megabytes, port)
    with running(server, port):
        with httpx.Client(base_url=url, timeout=600) as client:
            for name in reversed(side.warm):
                route, body = openai(prompts(1)[0], name)
                client.post(route, json=body | {"max_tokens": 1}).raise_for_status()
        asyncio.run(asked(url, side, 8, 1, seed=1))
        before = state(url)
        found = asyncio.run(asked(url, side, seconds, rows, seed=2))
    for row in found:
        row.loads, row.evictions = row.loads - before[0], row.evictions - before[1]
    return found


def line(name: str, row: Row, before: Row | None = None) -> str:
    tokens = row.tokens - (before.tokens if before else 0)
    seconds = row.seconds - (before.seconds if before else 0)
    return (
        f"| {name} | {tokens / seconds:.0f} | {row.answers} | {row.loads} | {row.evictions} | {row.memory / 1e6:.0f} |"
    )


HEAD = "| {} | tokens/s | answers | loads | evictions | MB |\n|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--resident", type=int, default=100)
    parser.add_argument("--only-memory", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        size = write_root(Path(name), args.adapters)
        root, room = Path(name) / "root", args.resident * size * 1.001 / 1e6
        names = [f"n{i}" for i in range(args.resident)]
        few = Side(f"{args.resident} names, all in memory", lambda rank: f"n{rank % args.resident}", names)
        many = Side(f"{args.adapters} names, room for {args.resident}", lambda rank: f"n{rank % args.adapters}", names)
        if args.only_memory:
            rows = measured(many, root, room, args.seconds, ROWS)
            print(HEAD.format("seconds"))
            for before, row in zip([None, *rows], rows, strict=False):
                print(line(f"{row.seconds:.0f}", row, before))
            return
        found = {side.name: measured(side, root, room, args.seconds, 1)[0] for side in (few, many)}
    print(HEAD.format("side"))
    for name, row in found.items():
        print(line(name, row))
    first, second = (row.tokens / row.seconds for row in found.values())
    print(f"{second / first:.2f} of the speed with all in memory")


if __name__ == "__main__":
    main()
