"""Adapters that come, change and go while requests run; and what may not be read."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_server import (
    FAST,
    Running,
    bytes_in_memory,
    eventually,
    in_process,
    lines,
    question,
    running,
    say,
    served,
    write_adapter,
)

from twofold.recipes.serve import ServeConfig
from twofold.server import layout
from twofold.server.layout import CURRENT, content_hash
from twofold.server.publishing import publish

pytest_plugins = ("tiny_fixtures", "server_fixtures")


# ---------------------------------------------------------------------------------------------- vLLM's endpoints


def test_load_and_unload_as_vllm_has_them(llama_base: Path, root: Path) -> None:
    with running(served(llama_base), ServeConfig(adapters=root)) as live:
        red = live.say("red")
        added = live.post("/v1/load_lora_adapter", {"lora_name": "rouge", "lora_path": "red"})
        assert (added.status_code, added.text) == (200, "Success: LoRA adapter 'rouge' added successfully.")
        assert added.headers["content-type"].startswith("text/plain")
        assert live.say("rouge") == red
        taken = live.post("/v1/load_lora_adapter", {"lora_name": "rouge", "lora_path": str(root / "green")})
        assert taken.status_code == 400
        assert live.say("rouge") == red
        swapped = {"lora_name": "rouge", "lora_path": str(root / "green"), "load_inplace": True}
        assert live.post("/v1/load_lora_adapter", swapped).status_code == 200
        assert live.say("rouge") == live.say("green") != red
        gone = live.post("/v1/unload_lora_adapter", {"lora_name": "rouge", "lora_int_id": None})
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'rouge' removed successfully.")
        assert live.post("/v1/chat/completions", question("rouge")).status_code == 404
        assert live.post("/v1/unload_lora_adapter", {"lora_name": "rouge"}).status_code == 404


def test_an_unloaded_adapter_frees_its_memory_and_stays_away(llama_base: Path, root: Path) -> None:
    with running(served(llama_base), ServeConfig(adapters=root, poll_seconds=FAST)) as live:
        red = live.say("red")
        before = live.service.registry.memory.used_bytes
        assert before > 0
        assert live.post("/v1/unload_lora_adapter", {"lora_name": "red"}).status_code == 200
        assert live.service.registry.memory.used_bytes == 0
        asyncio.run(asyncio.sleep(4 * FAST))  # the folder is looked at again, and changes nothing
        assert live.post("/v1/chat/completions", question("red")).status_code == 404
        assert live.post("/v1/load_lora_adapter", {"lora_name": "red", "lora_path": "red"}).status_code == 200
        assert live.say("red") == red
        assert live.service.registry.memory.used_bytes == before


def test_a_name_that_is_loaded_as_what_its_alias_names_follows_the_alias(
    llama_base: Path, adapters: Path, tmp_path: Path
) -> None:
    first = publish(adapters / "red", tmp_path, "bot")

    async def scene() -> None:
        async with in_process(served(llama_base), ServeConfig(adapters=tmp_path, poll_seconds=60.0)) as (
            client,
            service,
        ):

            async def load(path: str, **more: Any) -> int:
                body = {"lora_name": "bot", "lora_path": path, **more}
                return int((await client.post("/v1/load_lora_adapter", json=body)).status_code)

            async def answers_as(generation: str) -> bool:
                await service.registry.refresh()
                found = await client.post("/v1/chat/completions", json=question("bot"))
                return bool(found.json().get("system_fingerprint") == generation)

            assert await load(first) == 200
            second = publish(adapters / "green", tmp_path, "bot")
            assert await answers_as(second)
            assert await load(first, load_inplace=True) == 200
            assert await answers_as(first)
            assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "bot"})).status_code == 200
            assert not await answers_as(second)
            third = publish(adapters / "blue", tmp_path, "bot")
            assert await load("bot") == 200  # before the folder is looked at again
            assert await answers_as(third)
            publish(adapters / "red", tmp_path, "bot")
            assert await answers_as(first)

    asyncio.run(scene())


def test_two_names_of_one_folder_sign_and_go_each_for_itself(llama_base: Path, root: Path) -> None:
    with running(served(llama_base), ServeConfig(adapters=root)) as live:

        def signed(model: str) -> str:
            found = live.post("/v1/chat/completions", question(model))
            return str(found.json()["system_fingerprint"] if found.status_code == 200 else found.status_code)

        def unload(name: str) -> None:
            assert live.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == 200

        content = content_hash(root / "green")
        load = {"lora_name": "pinned", "lora_path": "green"}
        assert live.post("/v1/load_lora_adapter", load).status_code == 200
        for name in ("pinned", "green"):
            assert signed(name) == signed(f"{name}@{content}") == f"{name}@{content}"
            assert live.get(f"/v1/models/{name}").json()["generation"] == f"{name}@{content}"
        assert len(live.service.registry.loaded) == 1
        unload("pinned")
        assert signed("pinned") == signed(f"pinned@{content}") == "404"
        assert signed(f"green@{content}") == f"green@{content}"
        assert live.post("/v1/load_lora_adapter", load).status_code == 200
        unload("green")
        assert signed("green") == signed(f"green@{content}") == "404"
        assert signed("pinned") == f"pinned@{content}"
        unload("pinned")
        assert live.service.registry.loaded == []
        assert content not in live.get("/metrics").text


@pytest.mark.parametrize("name", ["tiny", "a/b", "../red", "a:b", "a@b", ".hidden", "x" * 300])
def test_names_that_could_mean_something_else_are_refused(live: Running, name: str) -> None:
    found = live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "red"})
    assert found.status_code == 400


# ---------------------------------------------------------------------------------------------- outside of the root


def test_nothing_outside_the_root_is_read_and_no_path_is_told(llama_base: Path, root: Path, adapters: Path) -> None:
    outside = adapters.parent / "outside"
    (root / "link").symlink_to(outside)
    shutil.copytree(root / "red", root / "linked-file")
    (root / "linked-file" / "adapter_model.safetensors").unlink()
    (root / "linked-file" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (root / "inside").symlink_to(root / "green")
    with running(served(llama_base), ServeConfig(adapters=root)) as live:
        paths = (
            str(outside),
            "../outside",
            "link",
            "linked-file",
            "red/../../outside",
            ".",
            "",
            "nowhere",
            "/etc",
            "\0",
        )
        for path in paths:
            found = live.post("/v1/load_lora_adapter", {"lora_name": "spy", "lora_path": path})
            assert found.status_code in (400, 404), path
            assert str(root) not in found.text
            assert "outside" not in found.text
        answers = {live.post("/v1/load_lora_adapter", {"lora_name": "spy", "lora_path": p}).text for p in paths if p}
        assert len(answers) == 1, "what exists and what does not are told apart"
        listed = {a["name"] for a in live.get("/v1/lora_adapters").json()["data"]}
        assert listed == {"red", "green", "inside"}
        assert live.say("inside") == live.say("green")


# ---------------------------------------------------------------------------------------------- what is refused


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_above_the_limits_is_refused_before_it_is_read(live: Running, adapters: Path) -> None:
    found = live.post("/v1/chat/completions", question("large"))
    assert found.status_code == 400
    assert "rank 16, above the 8" in found.json()["error"]["message"]
    assert found.json()["error"]["code"] == "adapter_refused"
    (state,) = [a for a in live.get("/v1/lora_adapters").json()["data"] if a["name"] == "large"]
    assert "rank 16" in state["refused"]
    assert state["generation"] is None


@pytest.mark.parametrize("damage", ["pickle", "foreign", "feature", "cut", "shape", "huge", "json"])
def test_damaged_and_foreign_adapters_are_refused_whole(
    llama_base: Path, other_base: Path, root: Path, damage: str
) -> None:
    red, config = root / "red", ServeConfig(adapters=root, max_adapter_mb=0.2)
    tensors = red / "adapter_model.safetensors"
    if damage == "pickle":
        tensors.rename(red / "adapter_model.bin")
    elif damage == "foreign":
        shutil.rmtree(red)
        write_adapter(served(other_base).base, red, 1)
    elif damage == "feature":
        change_config(red, layer_replication=[[0, 1]])
    elif damage == "cut":
        os.truncate(tensors, tensors.stat().st_size - 8)
    elif damage == "shape":
        change_config(red, r=2)
    elif damage == "huge":
        os.truncate(tensors, 300_000)
    else:
        (red / "adapter_config.json").write_text("{")
    with running(served(llama_base), config) as live:
        found = live.post("/v1/chat/completions", question("red"))
        assert found.status_code == (404 if damage == "pickle" else 400), found.text
        assert str(root) not in found.text
        assert "/tmp" not in found.text.replace("\\", "")
        assert live.say("green")
        assert live.get("/health").status_code == 200
        assert live.service.registry.memory.used_bytes == bytes_in_memory(served(llama_base), root / "green")


# ---------------------------------------------------------------------------------------------- changes under way


def test_a_replaced_adapter_is_a_new_generation_and_requests_keep_theirs(llama_base: Path, root: Path) -> None:
    async def scene() -> None:
        base = served(llama_base)
        async with in_process(base, ServeConfig(adapters=root, poll_seconds=FAST)) as (client, service):
            red, green = await say(client, "red", max_tokens=60), await say(client, "green")
            old = service.registry.generation_of("red").key
            running = asyncio.create_task(say(client, "red", max_tokens=60))
            await eventually(lambda: service.worker.scheduler.users(old) > 0)
            shutil.copyfile(root / "green" / "adapter_model.safetensors", root / "new")
            (root / "new").rename(root / "red" / "adapter_model.safetensors")
            await eventually(lambda: service.registry.generation_of("red") is None)
            assert await say(client, "red") == green
            assert await running == red
            await eventually(lambda: len(service.registry.loaded) == 2)
            assert old not in {g.key for g in service.registry.loaded}
            assert service.registry.generation_of("red").key != old

    asyncio.run(scene())


def test_unloading_lets_requests_end_and_then_frees(llama_base: Path, root: Path) -> None:
    async def scene() -> None:
        async with in_process(served(llama_base), ServeConfig(adapters=root)) as (client, service):
            red = await say(client, "red", max_tokens=40)
            going = asyncio.create_task(say(client, "red", max_tokens=40))
            await eventually(lambda: service.worker.scheduler.running > 0)
            assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "red"})).status_code == 200
            assert len(service.registry.loaded) == 1
            assert await going == red
            await eventually(lambda: not service.registry.loaded)
            assert 'lora_name="red"' not in (await client.get("/metrics")).text

    asyncio.run(scene())


def test_the_generation_that_answered_can_be_asked_for_until_it_is_replaced(llama_base: Path, root: Path) -> None:
    async def scene() -> None:
        async with in_process(served(llama_base), ServeConfig(adapters=root, poll_seconds=FAST)) as (client, service):
            red = await client.post("/v1/chat/completions", json=question("red"))
            key = red.json()["system_fingerprint"]
            again = await client.post("/v1/chat/completions", json=question(f"tiny:{key}"))
            assert (again.json()["choices"], again.json()["system_fingerprint"]) == (red.json()["choices"], key)
            assert (await client.get(f"/v1/models/{key}")).json()["generation"] == key
            shutil.copytree(root / "green", root / "red", dirs_exist_ok=True)
            await service.registry.refresh()
            assert (await client.post("/v1/chat/completions", json=question(key))).status_code == 404
            assert f'lora_name="{key}"' not in (await client.get("/metrics")).text

    asyncio.run(scene())


def test_adapters_that_appear_are_served_and_those_that_vanish_are_not(llama_base: Path, root: Path) -> None:
    async def scene() -> None:
        config = ServeConfig(adapters=root, poll_seconds=FAST)
        async with in_process(served(llama_base), config) as (client, service):
            red = await say(client, "red")
            shutil.copytree(root / "red", root / ".coming")
            (root / ".coming").rename(root / "twin")
            await eventually(lambda: "twin" in service.registry.names())
            assert await say(client, "twin") == red
            shutil.rmtree(root / "red")
            await eventually(lambda: "red" not in service.registry.names())
            assert (await client.post("/v1/chat/completions", json=question("red"))).status_code == 404
            await eventually(lambda: [g.name for g in service.registry.loaded] == ["twin"])
            page = (await client.get("/metrics")).text
            assert 'lora_name="twin"' in page
            assert 'lora_name="red"' not in page

    asyncio.run(scene())


def test_generations_lie_side_by_side_and_an_alias_says_which_counts(
    llama_base: Path, adapters: Path, tmp_path: Path
) -> None:
    first, second = publish(adapters / "red", tmp_path, "bot"), publish(adapters / "green", tmp_path, "bot")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([first, second, f"bot{CURRENT}"])
    assert first == f"bot@{content_hash(adapters / 'red')}"

    async def scene() -> None:
        config = ServeConfig(adapters=tmp_path, poll_seconds=FAST)
        async with in_process(served(llama_base), config) as (client, service):
            listed = [m["id"] for m in (await client.get("/v1/models")).json()["data"]]
            assert listed == ["tiny", "bot"]
            green = await say(client, "bot")
            assert green == await say(client, second)
            red = await say(client, first)
            assert red != green
            publish(adapters / "red", tmp_path, "bot")
            await eventually(lambda: service.registry.generation_of("bot").key == first)
            assert await say(client, "bot") == red

    asyncio.run(scene())


def test_an_alias_that_moves_while_the_folder_is_listed_is_never_away(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(adapters / "red", tmp_path, "bot")
    listed = layout._entries

    def and_then_published(root: Path) -> list[os.DirEntry[str]]:
        found = list(listed(root))
        publish(adapters / "green", tmp_path, "bot")
        return found

    monkeypatch.setattr(layout, "_entries", and_then_published)
    assert layout.scan(tmp_path)["bot"].digest == content_hash(adapters / "green")


def test_a_generation_that_is_not_what_its_name_says_is_refused(
    llama_base: Path, adapters: Path, tmp_path: Path
) -> None:
    generation = publish(adapters / "red", tmp_path, "bot")
    shutil.copyfile(
        adapters / "green" / "adapter_model.safetensors", tmp_path / generation / "adapter_model.safetensors"
    )
    with running(served(llama_base), ServeConfig(adapters=tmp_path)) as live:
        found = live.post("/v1/chat/completions", question("bot"))
        assert found.status_code == 400
        assert "promises" in found.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------- as it was trained


def test_an_adapter_answers_by_the_template_and_the_end_it_was_trained_with(llama_base: Path, tmp_path: Path) -> None:
    base = served(llama_base)
    template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    write_adapter(base.base, tmp_path / "plain", 0)
    write_adapter(base.base, tmp_path / "own", 0, chat_template=template)
    with running(base, ServeConfig(adapters=tmp_path)) as live:
        tokenizer = base.base.tokenizer

        def prompt_tokens(model: str) -> int:
            return int(live.post("/v1/chat/completions", question(model, "hat")).json()["usage"]["prompt_tokens"])

        assert prompt_tokens("own") == len(tokenizer("<hat>")["input_ids"])
        assert prompt_tokens("plain") == len(base.base.renderer.chat_prompt([{"role": "user", "content": "hat"}]))
        body = {"model": "own", "prompt": "<hat>", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        direct = live.post("/v1/completions", body).json()["choices"][0]["text"]
        assert live.say("own", "hat") == direct
        every = list(range(len(tokenizer)))
        write_adapter(base.base, tmp_path / "mute", 0, chat_template=template, eos_token_ids=every)
        live.post("/v1/load_lora_adapter", {"lora_name": "early", "lora_path": "mute"})
        (choice,) = live.post("/v1/chat/completions", question("early", "hat", ignore_eos=False)).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
        streamed = lines(live.post("/v1/chat/completions", question("own", "hat", stream=True)).text)
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed[:-1]) == direct
