"""vLLM over the same folder, the real one: tokens equal to ours, generations that follow the folder, and what it refuses.

Slow, and only where there is a vLLM: in this environment, or in that of the Python which TWOFOLD_VLLM_PYTHON names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_base import llama, tokenizer, write_base
from tiny_server import write_adapter

from twofold.base.load import load_base
from twofold.engine.request import Request
from twofold.engine.scheduler import Made, Scheduler
from twofold.server.publishing import publish

PYTHON = os.environ.get("TWOFOLD_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
NEW = 24
SECONDS = 300
FLAGS = "--max-model-len 128 --enforce-eager --no-enable-prefix-caching"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PYTHON is None, reason="no vLLM here; TWOFOLD_VLLM_PYTHON can name the Python of one"),
]


@dataclass
class Handed:
    """vLLM under way over a folder."""

    url: str
    base: Path
    root: Path
    log: Path
    process: subprocess.Popen[bytes]

    def ask(self, model: str, prompt: list[int], **more: Any) -> httpx.Response:
        settings = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **more}
        return httpx.post(
            f"{self.url}/v1/completions", json={"model": model, "prompt": prompt, **settings}, timeout=120
        )

    def tokens(self, model: str, prompt: list[int]) -> list[int]:
        found = self.ask(model, prompt)
        assert found.status_code == 200, found.text + self.log.read_text()[-3000:]
        return list(found.json()["choices"][0]["token_ids"])

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 30
        while words not in self.log.read_text():
            assert time.monotonic() < deadline, f"the log never said {words!r}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def handed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Handed]:
    """Two plain adapters of different ranks and scalings, a generation with an alias, and one that vLLM cannot serve."""
    folder = tmp_path_factory.mktemp("vllm")
    tokens = tokenizer()
    made = write_base(folder / "tiny-llama", llama(len(tokens), head_dim=32), tokens)
    base, root = load_base(str(made), "float32", "cpu"), folder / "adapters"
    write_adapter(base, root / "red", 1)
    write_adapter(base, root / "green", 2, r=16)
    for seed, name in ((3, "blue"), (4, "bluer")):
        write_adapter(base, folder / name, seed, r=2)
    publish(folder / "blue", root, "blue")
    shutil.copytree(root / "red", root / "stretched")
    config = json.loads((root / "red" / "adapter_config.json").read_text())
    (root / "stretched" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "twofold",
        "serve",
        "--engine",
        "vllm",
        "--vllm-python",
        str(PYTHON),
        "--base",
        str(made),
    ]
    command += [
        "--adapters",
        str(root),
        "--name",
        "tiny",
        "--dtype",
        "float32",
        "--port",
        str(port),
        "--poll-seconds",
        "0.5",
    ]
    log = folder / "log"
    with log.open("wb") as written:
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, f"--vllm-flags={FLAGS}"], stdout=written, stderr=written, env=environment)
    try:
        _until_ready(f"http://127.0.0.1:{port}", process, log)
        yield Handed(f"http://127.0.0.1:{port}", made, root, log, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() < deadline, log.read_text()[-5000:]
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.5)


def ours(base_folder: Path, adapter: Path | None, prompt: list[int]) -> list[int]:
    """Our own greedy tokens, alone in the batch."""
    base = load_base(str(base_folder), "float32", "cpu")
    scheduler = Scheduler(base.model, streams=1, capacity=128)
    if adapter is not None:
        scheduler.put_adapter("a", adapter)
    worn = {} if adapter is None else {"a": 1.0}
    scheduler.add(Request(token_ids=prompt, max_new_tokens=NEW, adapters=worn))
    found: list[int] = []
    while not scheduler.idle:
        found += [e.token for e in scheduler.step() if isinstance(e, Made)]
    return found


PROMPTS = ([5, 40, 41, 90, 12, 7], [17, 200, 33, 33, 64, 8, 120, 9, 10, 250, 31])


def test_the_tokens_of_each_adapter_are_ours(handed: Handed) -> None:
    """One after the other: on CPUs vLLM gives rows of a mixed batch each other's adapters (vllm#48421)."""
    blue = next(handed.root.glob("blue@*"))
    folders = {"red": handed.root / "red", "green": handed.root / "green", "blue": blue, blue.name: blue, "tiny": None}
    said = set()
    for prompt in PROMPTS:
        for name, folder in folders.items():
            found = handed.tokens(name, prompt)
            assert found == ours(handed.base, folder, prompt), name
            said.add((tuple(prompt), tuple(found)))
    assert len(said) == 4 * len(PROMPTS)


def test_the_limits_follow_from_the_folder_and_what_vllm_lacks_is_named(handed: Handed) -> None:
    log = handed.log.read_text()
    assert "--max-lora-rank 16" in log
    assert "--max-loras 4" in log  # red, green, blue and blue@...
    assert "vLLM will not serve 'stretched': it does not do DoRA" in " ".join(log.split())
    assert handed.ask("stretched", PROMPTS[0]).status_code == 404
    assert handed.ask("rad", PROMPTS[0]).status_code == 404


def test_nobody_loads_adapters_past_the_folder_and_pages_keep_out(handed: Handed) -> None:
    asked = {"lora_name": "mine", "lora_path": str(handed.root / "red")}
    assert httpx.post(f"{handed.url}/v1/load_lora_adapter", json=asked).status_code == 403
    assert httpx.post(f"{handed.url}/v1/unload_lora_adapter", json={"lora_name": "red"}).status_code == 403
    assert httpx.get(f"{handed.url}/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(f"{handed.url}/v1/models", headers={"origin": "http://evil.example"}).status_code == 403


def test_an_alias_that_moves_is_followed(handed: Handed) -> None:
    before = handed.ask("blue", PROMPTS[0]).json()
    generation = publish(handed.root.parent / "bluer", handed.root, "blue")
    handed.wait_for("'blue' has changed")
    after = handed.ask("blue", PROMPTS[0]).json()
    assert after["model"] == generation != before["model"]
    assert after["choices"][0]["token_ids"] == ours(handed.base, handed.root / generation, PROMPTS[0])
    assert after["choices"][0]["token_ids"] != before["choices"][0]["token_ids"]
    old = before["model"].partition("~")[0]
    assert handed.tokens(old, PROMPTS[0]) == before["choices"][0]["token_ids"]


def test_a_plain_adapter_that_changes_is_followed(handed: Handed) -> None:
    before = handed.tokens("red", PROMPTS[1])
    shutil.copyfile(handed.root.parent / "blue" / "adapter_model.safetensors", handed.root / "spare")
    shutil.copyfile(handed.root.parent / "blue" / "adapter_config.json", handed.root / "red" / "adapter_config.json")
    (handed.root / "spare").rename(handed.root / "red" / "adapter_model.safetensors")
    handed.wait_for("'red' has changed")
    after = handed.tokens("red", PROMPTS[1])
    assert after != before
    assert after == ours(handed.base, handed.root.parent / "blue", PROMPTS[1])
