"""The server under load and under trouble: full, abandoned, late, failing, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny_server import Running, bytes_in_memory, eventually, in_process, lines, question, running, served

from twofold.engine import loading
from twofold.engine.grammar import Grammars
from twofold.recipes.serve import ServeConfig
from twofold.server.worker import FAILURES

pytest_plugins = ("tiny_fixtures", "server_fixtures")
LONG = {"max_tokens": 200}
"""An answer that takes many steps."""


def quiet(service: Any) -> bool:
    """Whether the engine has let go of everything."""
    scheduler = service.worker.scheduler
    leases = sum(g.leases for g in service.registry.loaded)
    return bool(scheduler.idle and service.admission.inside == 0 and leases == 0)


def until(holds: Callable[[], Any]) -> None:
    """Wait until something holds."""
    asyncio.run(eventually(holds))


def by_adapter(page: str, sample: str) -> dict[str, float]:
    """The values of one series of the metrics page."""
    found = [s for family in text_string_to_metric_families(page) for s in family.samples if s.name == sample]
    return {s.labels["lora_name"]: s.value for s in found}


# ---------------------------------------------------------------------------------------------- the queue


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(llama_base: Path, adapters: Path) -> None:
    async def scene() -> None:
        config = ServeConfig(adapters=adapters, max_queued=2)
        async with in_process(served(llama_base, streams=1), config) as (client, service):
            body = question("red", max_tokens=60)
            going = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(3)]
            await eventually(lambda: service.admission.inside == 3)
            refused = await client.post("/v1/chat/completions", json=question("green"))
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert [r.status_code for r in await asyncio.gather(*going)] == [200, 200, 200]
            await eventually(lambda: quiet(service))
            assert (await client.post("/v1/chat/completions", json=question("green"))).status_code == 200

    asyncio.run(scene())


def test_the_time_in_the_queue_is_that_before_the_first_step(llama_base: Path, adapters: Path) -> None:
    """With one slot the second answer waits for nearly as long as the first one takes, and its own first token comes after that."""

    async def scene() -> None:
        async with in_process(served(llama_base, streams=1), ServeConfig(adapters=adapters)) as (client, _):
            for name in ("red", "green"):
                await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name})
            first = asyncio.create_task(client.post("/v1/chat/completions", json=question("red", max_tokens=100)))
            second = asyncio.create_task(client.post("/v1/chat/completions", json=question("green")))
            await asyncio.gather(first, second)
            page = (await client.get("/metrics")).text
            queue = by_adapter(page, "vllm:request_queue_time_seconds_sum")
            whole = by_adapter(page, "vllm:e2e_request_latency_seconds_sum")
            assert queue["red"] < 0.5 * whole["red"] < queue["green"] < whole["green"]

    asyncio.run(scene())


# ---------------------------------------------------------------------------------------------- leaving


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(live: Running, stream: bool) -> None:
    service = live.service
    made = "vllm:generation_tokens_total"

    def tokens() -> float:
        families = text_string_to_metric_families(live.get("/metrics").text)
        return sum(s.value for f in families for s in f.samples if s.name == made)

    before = tokens()
    with httpx.Client() as client, contextlib.suppress(httpx.ReadTimeout):
        asked: dict[str, Any] = {"json": question("red", stream=stream, n=16, **LONG), "timeout": 0.2}
        with client.stream("POST", f"{live.url}/v1/chat/completions", **asked) as response:
            for _ in response.iter_lines():
                break
    deadline = time.monotonic() + 10
    while not quiet(service):
        assert time.monotonic() < deadline, "the streams go on although nobody reads them"
        time.sleep(0.01)
    assert tokens() - before < 16 * LONG["max_tokens"]


def test_nobody_waits_for_a_form_that_is_compiled_for_another(
    llama_base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, compiled = threading.Event(), threading.Event(), Grammars.regex

    def slow(grammars: Grammars, pattern: str) -> Any:
        begun.set()
        assert go_on.wait(20)
        return compiled(grammars, pattern)

    monkeypatch.setattr(Grammars, "regex", slow)

    async def scene() -> None:
        async with in_process(served(llama_base), ServeConfig(adapters=adapters)) as (client, _):
            formed = question("red", guided_regex="[ab]{3}", ignore_eos=False)
            form = asyncio.create_task(client.post("/v1/chat/completions", json=formed))
            await asyncio.to_thread(begun.wait, 20)
            try:
                assert (await client.post("/v1/chat/completions", json=question("green"))).status_code == 200
            finally:
                go_on.set()
            assert len((await form).json()["choices"][0]["message"]["content"]) == 3

    asyncio.run(scene())


def test_a_late_answer_is_given_up(llama_base: Path, adapters: Path) -> None:
    async def scene() -> None:
        config = ServeConfig(adapters=adapters, deadline_seconds=0.3)
        async with in_process(served(llama_base), config) as (client, service):
            found = await client.post("/v1/chat/completions", json=question("tiny", n=16, **LONG))
            assert found.status_code == 504
            assert found.json()["error"]["code"] == "deadline"
            streamed = await client.post("/v1/chat/completions", json=question("tiny", n=16, stream=True, **LONG))
            assert lines(streamed.text)[-1]["error"]["code"] == "deadline"
            await eventually(lambda: quiet(service))

    asyncio.run(scene())


# ---------------------------------------------------------------------------------------------- trouble


def test_a_step_that_fails_ends_its_streams_and_not_the_server(
    llama_base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        async with in_process(served(llama_base), ServeConfig(adapters=adapters)) as (client, service):
            expected = (await client.post("/v1/chat/completions", json=question("red"))).json()
            going = asyncio.create_task(client.post("/v1/chat/completions", json=question("red", **LONG)))
            await eventually(lambda: service.worker.scheduler.running)
            with monkeypatch.context() as broken:
                broken.setattr(service.worker.scheduler, "step", lambda: 1 // 0)
                failed = await going
                assert failed.status_code == 500
                assert failed.json()["error"]["code"] == "engine_error"
                assert "ZeroDivisionError" not in failed.text
                await eventually(lambda: not service.worker.healthy)
                assert (await client.get("/health")).status_code == 503
            again = await client.post("/v1/chat/completions", json=question("red"))
            assert again.json()["choices"] == expected["choices"]
            assert (await client.get("/health")).status_code == 200
            await eventually(lambda: quiet(service))

    asyncio.run(scene())


def test_an_engine_that_fails_at_every_pass_is_not_healthy(llama_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though after each failure a step without a pass clears up, and does not fail."""

    async def scene() -> None:
        async with in_process(served(llama_base), ServeConfig()) as (client, service):
            with monkeypatch.context() as broken:
                broken.setattr(service.worker.scheduler._forward, "run", lambda _: 1 // 0)
                for _ in range(FAILURES):
                    await eventually(lambda: service.worker.scheduler.idle)
                    assert (await client.get("/health")).status_code == 200
                    assert (await client.post("/v1/chat/completions", json=question("tiny"))).status_code == 500
                assert (await client.get("/health")).status_code == 503
            assert (await client.post("/v1/chat/completions", json=question("tiny"))).status_code == 200
            assert (await client.get("/health")).status_code == 200

    asyncio.run(scene())


def test_after_failed_steps_an_adapter_is_read_though_nobody_asks_anything_else(
    llama_base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        config = ServeConfig(adapters=adapters, deadline_seconds=5.0)
        async with in_process(served(llama_base), config) as (client, service):
            with monkeypatch.context() as broken:
                broken.setattr(service.worker.scheduler._forward, "run", lambda _: 1 // 0)
                for _ in range(FAILURES):
                    assert (await client.post("/v1/chat/completions", json=question("tiny"))).status_code == 500
            monkeypatch.setattr(loading, "BETWEEN_PASSES", 0.0)  # a piece a step
            assert (await client.post("/v1/chat/completions", json=question("red"))).status_code == 200
            assert (await client.get("/health")).status_code == 200

    asyncio.run(scene())


# ---------------------------------------------------------------------------------------------- many at once


def test_every_client_gets_its_own_adapter_however_many_there_are(llama_base: Path, adapters: Path) -> None:
    """40 clients, base and three adapters mixed, streamed and not, some of them leaving: each answer gives its adapter away."""
    models = ("tiny", "red", "green", "blue")

    async def ask(client: Any, model: str, stream: bool, leaves: bool) -> str | None:
        body = question(model, stream=stream)
        if leaves:
            task = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await asyncio.sleep(0.05)
            task.cancel()
            return None
        found = await client.post("/v1/chat/completions", json=body)
        if stream:
            return "".join(e["choices"][0]["delta"].get("content", "") for e in lines(found.text)[:-1])
        return str(found.json()["choices"][0]["message"]["content"])

    async def scene() -> None:
        async with in_process(served(llama_base, streams=6), ServeConfig(adapters=adapters)) as (client, service):
            alone = {m: await ask(client, m, False, False) for m in models}
            assert len(set(alone.values())) == 4
            draw = random.Random(5)
            asked = [(draw.choice(models), draw.random() < 0.5, draw.random() < 0.2) for _ in range(40)]
            said = await asyncio.gather(*(ask(client, *a) for a in asked))
            wrong = [(a, s) for a, s in zip(asked, said, strict=True) if s is not None and s != alone[a[0]]]
            assert wrong == []
            await eventually(lambda: quiet(service))

    asyncio.run(scene())


# ---------------------------------------------------------------------------------------------- what it says of itself


def test_metrics_have_vllms_names_and_count_by_adapter(llama_base: Path, adapters: Path) -> None:
    with running(served(llama_base), ServeConfig(adapters=adapters, max_rank=8)) as live:
        usage = live.post("/v1/chat/completions", question("red")).json()["usage"]
        live.say("tiny")
        page = live.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain")
        families = {f.name: f for f in text_string_to_metric_families(page.text)}

        def value(name: str, sample: str, **labels: str) -> float:
            found = [s for s in families[name].samples if s.name == sample and labels.items() <= s.labels.items()]
            return sum(s.value for s in found)

        red = {"model_name": "tiny", "lora_name": "red"}
        assert value("vllm:prompt_tokens", "vllm:prompt_tokens_total", **red) == usage["prompt_tokens"]
        assert value("vllm:generation_tokens", "vllm:generation_tokens_total", **red) == usage["completion_tokens"] == 8
        assert value("vllm:generation_tokens", "vllm:generation_tokens_total", lora_name="") == 8
        finished = ("vllm:request_success", "vllm:request_success_total")
        assert value(*finished, **red, finished_reason="length") == 1
        for name, count in (
            ("vllm:time_to_first_token_seconds", 1),
            ("vllm:inter_token_latency_seconds", 7),
            ("vllm:e2e_request_latency_seconds", 1),
            ("vllm:request_queue_time_seconds", 1),
        ):
            assert value(name, f"{name}_count", **red) == count
        assert value("vllm:num_requests_running", "vllm:num_requests_running") == 0
        assert value("vllm:num_requests_waiting", "vllm:num_requests_waiting") == 0
        assert 0 <= value("vllm:kv_cache_usage_perc", "vllm:kv_cache_usage_perc") <= 1
        assert value("twofold:adapters_registered", "twofold:adapters_registered") == 4
        assert value("twofold:adapters_loaded", "twofold:adapters_loaded") == 1
        (info,) = families["vllm:lora_requests_info"].samples
        assert set(info.labels) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}


def test_the_log_has_a_line_a_request_without_what_was_said(live: Running, caplog: pytest.LogCaptureFixture) -> None:
    from twofold.server.access import JsonLines

    with caplog.at_level(logging.INFO, logger="twofold.server"):
        found = live.post("/v1/chat/completions", question("red", "a secret"), headers={"x-request-id": "mine-1"})
        assert found.headers["x-request-id"] == "mine-1"
        strange = live.get("/health", headers={"x-request-id": 'x" injected'})
        assert strange.headers["x-request-id"] != 'x" injected'
    said = [json.loads(JsonLines().format(r)) for r in caplog.records if r.getMessage() == "request"]
    mine = next(s for s in said if s["request"] == "mine-1")
    assert (mine["route"], mine["status"], mine["model"]) == ("/v1/chat/completions", 200, "red")
    assert mine["generation"].startswith("red@")
    assert "secret" not in caplog.text


# ---------------------------------------------------------------------------------------------- the end


def test_sigterm_lets_answers_end_and_takes_no_more(llama_base: Path, adapters: Path) -> None:
    command = [sys.executable, "-m", "twofold", "serve", "--base", llama_base, "--adapters", adapters, "--port", "0"]
    flags = ["--name", "tiny", "--dtype", "float32", "--context", "256"]
    process = subprocess.Popen([str(c) for c in (*command, *flags)], stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    try:
        (url,) = re.findall(r"http://127.0.0.1:[1-9]\d*", _until(process.stderr, "answers for")[-1])
        body = question("red", stream=True, max_tokens=200)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as response:
            events = response.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            rest = [e for e in events if e]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 20
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert process.wait(20) == -signal.SIGTERM
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()


def _until(stream: Any, words: str) -> list[str]:
    """The lines up to one with these words."""
    found: list[str] = []
    for line in stream:
        found.append(line)
        if words in line:
            return found
    raise AssertionError("".join(found))


def test_answers_that_the_drain_does_not_wait_for_end_with_an_error(
    llama_base: Path, adapters: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Streamed or whole, in the engine, in front of it, or waiting for room in memory."""
    base = served(llama_base, streams=1)
    room = 1.5 * bytes_in_memory(base, adapters / "red") / 1e6
    asked = [question("red", stream=stream, n=16, **LONG) for stream in (True, False, True, False)]
    config = ServeConfig(adapters=adapters, drain_seconds=0.2, adapter_memory_mb=room)
    with running(base, config) as live, ThreadPoolExecutor(5) as clients:
        url = "/v1/chat/completions"
        going = [clients.submit(live.post, url, body) for body in asked]
        until(lambda: live.service.worker.scheduler.running and live.service.admission.inside == 64)
        waiting = clients.submit(live.post, url, question("green"))
        until(lambda: live.service.registry.awaited() == ["green"])
        live.server.should_exit = True
        found = [one.result() for one in going]
        late = waiting.result()
    for body, answer in zip(asked, found, strict=True):
        assert answer.status_code == (200 if body["stream"] else 503)
        error = lines(answer.text)[-1] if body["stream"] else answer.json()
        assert error["error"]["code"] == "draining"
    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
    assert [r for r in caplog.records if r.exc_info or (r.name == "uvicorn.error" and r.levelno > logging.INFO)] == []


def test_while_it_drains_it_is_not_ready_and_refuses(llama_base: Path, adapters: Path) -> None:
    async def scene() -> None:
        async with in_process(served(llama_base), ServeConfig(adapters=adapters)) as (client, service):
            assert (await client.get("/ready")).status_code == 200
            going = asyncio.create_task(client.post("/v1/chat/completions", json=question("red", max_tokens=100)))
            await eventually(lambda: service.worker.scheduler.running)
            service.admission.draining = True
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 200
            refused = await client.post("/v1/chat/completions", json=question("red"))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert (await going).status_code == 200

    asyncio.run(scene())
