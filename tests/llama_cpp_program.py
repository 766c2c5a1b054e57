"""llama.cpp for tests: its converter scripts, and its server, which is built where it is not there yet.

Its sources are in the sdist of PyPI's `llama-cpp-python`:
    pip download --no-deps --no-binary :all: -d DIR llama-cpp-python==0.3.36 && tar xf DIR/llama_cpp_python-*.tar.gz
    LLAMA_CPP=.../vendor/llama.cpp make test-slow
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

WITHOUT = "LLAMA_CPP names no folder of llama.cpp's sources (vendor/llama.cpp in the sdist of llama-cpp-python)"
needed = pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason=WITHOUT)
STARTS_WITHIN = 120.0


def sources() -> Path:
    return Path(os.environ["LLAMA_CPP"])


def convert(script: str, *arguments: object) -> None:
    """Run one of its converters with its own copy of the gguf package."""
    subprocess.run([sys.executable, sources() / script, *map(str, arguments)], check=True, capture_output=True)


def server_program() -> Path:
    """The server; built, which takes some minutes, if it is not there."""
    found = [p for p in sources().glob("*/bin/llama-server") if p.is_file()]
    if found:
        return found[0]
    if not all(map(shutil.which, ("cmake", "c++"))):
        pytest.skip(f"no llama-server under {sources()}, and no cmake and compiler to build it with")
    build = sources() / "build"
    off = ("-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DCMAKE_BUILD_TYPE=Release")
    subprocess.run(["cmake", "-S", sources(), "-B", build, *off], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build, "-j", "2", "--target", "llama-server"], check=True, capture_output=True)
    return build / "bin" / "llama-server"


class Served:
    """A running server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def log_probabilities(self, prompt: Sequence[int], choices: int, adapters: Sequence[float] = ()) -> torch.Tensor:
        """Of every token as the next one.

        Args:
            choices: how many tokens there are.
            adapters: the scale of each adapter it was started with.
        """
        asked: dict[str, Any] = {"prompt": list(prompt), "n_predict": 1, "n_probs": choices, "temperature": 0.0}
        asked |= {"cache_prompt": False, "lora": [{"id": i, "scale": s} for i, s in enumerate(adapters)]}
        body = json.dumps(asked).encode()
        request = urllib.request.Request(f"{self._url}/completion", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            told = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
        found = torch.full((choices,), torch.nan)
        for one in told:
            found[one["id"]] = one["logprob"]
        return found


@contextmanager
def served(model: Path, adapters: Sequence[Path] = ()) -> Iterator[Served]:
    """A model on a server of one slot, whose cache is in float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [server_program(), "-m", model, "--port", port, "-np", 1, "-c", 512, "-t", 2, "-fa", "off", "--no-warmup"]
    command += ["-ctk", "f32", "-ctv", "f32"]
    for path in adapters:
        command += ["--lora", path]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(server_program().parent)}
    running = subprocess.Popen(
        [str(word) for word in command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        found, started = Served(port), time.monotonic()
        while not found.ready():
            assert running.poll() is None, f"llama-server ended with {running.returncode}"
            assert time.monotonic() - started < STARTS_WITHIN, "llama-server does not answer"
            time.sleep(0.1)
        yield found
    finally:
        running.terminate()
        running.wait()
