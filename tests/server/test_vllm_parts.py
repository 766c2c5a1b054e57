"""What is handed to vLLM, without vLLM: limits, names, copies, the door in front of it."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from tiny_adapters import adapted

from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.errors import AdapterFileError, ConfigError, ForeignBaseError, UserError
from twofold.events import Event, Warned
from twofold.recipes.serve import ServeConfig
from twofold.server.layout import Limits, content_hash, scan
from twofold.server.publishing import publish
from twofold.server.security import Policy, digest
from twofold.server.vllm.abilities import RANKS, Described, describe, limits_for
from twofold.server.vllm.guard import POLICY, Guard, as_text
from twofold.server.vllm.launch import changed, plan, serve
from twofold.server.vllm.plugin import BASE, Folder, check

pytest_plugins = ("tiny_fixtures", "server_fixtures")
LIMITS = Limits(10**8, 512)


@pytest.fixture
def root(adapters: Path, tmp_path: Path) -> Path:
    for name in ("red", "green"):
        shutil.copytree(adapters / name, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


# ---------------------------------------------------------------------------------------------- what vLLM can do


def written(folder: Path, **settings: Any) -> Path:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, **settings})
    save_adapter(adapted("llama", config), folder, "default")
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules (lm_head)"),
    ],
)
def test_what_vllm_does_not_do_is_named(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    assert words in describe(written(tmp_path / "a", **settings)).lacking


def test_what_vllm_does_is_described_by_the_highest_rank(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", rank_pattern={"q_proj": 24}, use_rslora=True)
    assert describe(folder) == Described(24, (folder / "adapter_model.safetensors").stat().st_size, ())


@pytest.mark.parametrize("damage", ["{", "[]", '{"peft_type": "LORA"}'])
def test_a_damaged_adapter_is_an_error_of_ours(tmp_path: Path, damage: str) -> None:
    folder = written(tmp_path / "a")
    (folder / "adapter_config.json").write_text(damage)
    with pytest.raises(AdapterFileError):
        describe(folder)
    (folder / "adapter_config.json").write_text('{"r": 4}')
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(AdapterFileError):
        describe(folder)


@given(
    ranks=st.lists(st.tuples(st.integers(1, 512), st.integers(1, 10**6)), max_size=40),
    at_once=st.integers(1, 64),
    budget=st.integers(1, 10**8),
)
def test_the_limits_let_every_adapter_in_and_stay_within_the_budget(
    ranks: list[tuple[int, int]], at_once: int, budget: int
) -> None:
    known = [Described(r, size * r, ()) for r, size in ranks]
    found = limits_for(known, at_once, budget)
    assert found.max_lora_rank in RANKS
    assert all(found.max_lora_rank >= a.rank for a in known)
    assert 1 <= found.max_loras <= max(1, min(at_once, len(known)))
    assert found.max_cpu_loras >= found.max_loras
    largest = max((a.bytes for a in known), default=0)
    assert found.max_loras == 1 or found.max_loras * largest <= budget


def test_a_rank_above_all_of_vllms_is_refused() -> None:
    with pytest.raises(AdapterFileError, match="at most 512"):
        limits_for([Described(513, 1, ())], 1, 1)


# ---------------------------------------------------------------------------------------------- the folder


def test_names_mean_what_they_mean_to_our_own_server(root: Path) -> None:
    generation = publish(root / "red", root, "intents")
    folder = Folder(root, LIMITS)
    assert folder.find("intents") == (generation, root / generation)
    for name in ("tiny", "../adapters/red", "red/", ".", "intents.current", "a:red"):
        assert folder.find(name) is None


def test_no_two_requests_of_vllm_get_the_same_name(root: Path) -> None:
    """vLLM takes requests with one name for one adapter, also where their numbers differ."""
    generation = publish(root / "red", root, "intents")
    folder = Folder(root, LIMITS)
    given = [folder.find(name) for name in ("intents", generation, "intents", "red", "red")]
    assert all(given)
    assert len({name for name, _ in given if name}) == 5  # type: ignore[misc]


def test_a_plain_adapter_is_served_from_a_copy_that_stays(root: Path) -> None:
    folder = Folder(root, LIMITS)
    name, first = folder.find("red") or ("", Path())
    before = content_hash(first)
    assert name == f"red@{before}"
    shutil.copyfile(root / "green" / "adapter_model.safetensors", root / "red" / "adapter_model.safetensors")
    assert content_hash(first) == before
    name, second = folder.find("red") or ("", Path())
    assert content_hash(second) == name.partition("@")[2] != before


def test_a_generation_that_was_tampered_with_is_not_served(root: Path) -> None:
    generation = publish(root / "red", root, "intents")
    shutil.copyfile(root / "green" / "adapter_model.safetensors", root / generation / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="not those"):
        Folder(root, LIMITS).find("intents")


def test_an_adapter_of_another_base_is_not_served(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = json.loads((root / "red" / "twofold.json").read_text())["base"]
    (tmp_path / "base.json").write_text(json.dumps(recorded))
    monkeypatch.setenv(BASE, str(tmp_path / "base.json"))
    check(root / "red", "red")
    (tmp_path / "base.json").write_text(json.dumps({**recorded, "samples": [v + 1 for v in recorded["samples"]]}))
    with pytest.raises(ForeignBaseError):
        check(root / "red", "red")


def test_the_plugin_brings_no_torch_into_vllms_processes() -> None:
    code = "import sys, twofold.server.vllm.plugin; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- the launcher


def test_what_has_changed_is_what_names_stand_for(root: Path) -> None:
    publish(root / "red", root, "intents")
    before = scan(root)
    assert changed(before, scan(root)) == []
    publish(root / "green", root, "intents")
    shutil.rmtree(root / "red")
    assert changed(before, scan(root)) == ["intents", "red"]


def test_the_plan_starts_vllm_with_the_folders_limits(root: Path, llama_base: Path, tmp_path: Path) -> None:
    shutil.copytree(written(tmp_path / "dora", use_dora=True), root / "dora")
    heard: list[Event] = []
    config = ServeConfig(base=str(llama_base), adapters=root, engine="vllm", api_key=("secret",), vllm_flags="--seed 3")
    launch = plan(config, tmp_path / "state", heard.append)
    line = " ".join(launch.command)
    assert "--max-lora-rank 8 --max-loras 2 --max-cpu-loras 2" in line
    assert line.endswith("--seed 3")
    assert "secret" not in line + json.dumps(launch.environment)
    assert [w for w in heard if isinstance(w, Warned) and "'dora': it does not do DoRA" in w.text]
    path = launch.environment["PYTHONPATH"].partition(":")[0]
    found = "from importlib.metadata import entry_points as e; print(list(e(group='vllm.general_plugins')))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {path!r}); {found}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "twofold.server.vllm.plugin:register" in done.stdout


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_queued": 3}, "--max-queued is for Twofold's own engine"),
        ({"quantization": "nf4"}, "--quantization"),
        ({"weights": "int8"}, "--weights is for Twofold's own engine"),
        ({"merge_after": 4}, "--merge-after is for Twofold's own engine"),
        ({"cache_memory_mb": 64.0}, "--cache-memory-mb is for Twofold's own engine"),
        ({"prefix_cache": False}, "--no-prefix-cache is for Twofold's own engine"),
        ({"adapters": None}, "adapter folder"),
        ({"port": 0}, "--port"),
    ],
)
def test_flags_that_mean_nothing_to_vllm_are_refused(
    root: Path, llama_base: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    config = ServeConfig(**{"base": str(llama_base), "adapters": root, "engine": "vllm", **settings})
    with pytest.raises(ConfigError, match=words):
        plan(config, tmp_path, lambda _: None)


def test_a_python_without_vllm_is_told_before_anything_starts(root: Path, llama_base: Path) -> None:
    with pytest.raises(ConfigError, match="--vllm-python"):
        serve(ServeConfig(base=str(llama_base), adapters=root, engine="vllm"), lambda _: None)
    nowhere = ServeConfig(base=str(llama_base), adapters=root, engine="vllm", vllm_python=root / "no" / "python")
    with pytest.raises(ConfigError, match="cannot start"):
        serve(nowhere, lambda _: None)


def test_vllms_flags_need_vllm() -> None:
    with pytest.raises(UserError, match="engine vllm"):
        ServeConfig(vllm_flags="--seed 3")


# ---------------------------------------------------------------------------------------------- the door


def test_the_guard_lets_in_whom_our_own_server_would(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(hosts=frozenset({"models.example"}), keys=frozenset({digest("key")}))
    monkeypatch.setenv(POLICY, as_text(policy, "token", 1000))
    routes = [
        Route(path, lambda _: PlainTextResponse("in"), methods=["GET", "POST"])
        for path in ("/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/health")
    ]
    transport = httpx.ASGITransport(Guard(Starlette(routes=routes)))

    async def scene() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://models.example") as client:

            async def status(path: str, key: str | None = None, **headers: str) -> int:
                named = headers | ({"authorization": f"Bearer {key}"} if key else {})
                return (await client.post(path, headers=named, json={})).status_code

            assert await status("/health") == 200
            assert await status("/v1/models") == 401
            assert await status("/v1/models", "key") == 200
            assert await status("/v1/models", "key", host="evil.example") == 403
            assert await status("/v1/models", "key", origin="http://evil.example") == 403
            assert await status("/v1/load_lora_adapter", "key") == 403
            assert await status("/v1/load_lora_adapter") == 403
            assert await status("/v1/unload_lora_adapter", "token") == 200

    asyncio.run(scene())
