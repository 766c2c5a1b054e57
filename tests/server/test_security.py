"""Who is let in: hosts, origins, keys and sizes; and that no request, however odd, finds a hole."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from tiny_server import Running, in_process, question, running, served

from twofold.errors import ConfigError
from twofold.recipes.serve import ServeConfig

pytest_plugins = ("tiny_fixtures", "server_fixtures")


# ---------------------------------------------------------------------------------------------- Host and Origin


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""]
)
def test_a_name_that_is_not_ours_is_refused_even_on_loopback(live: Running, host: str) -> None:
    found = live.get("/v1/models", headers={"host": host})
    assert (found.status_code, found.json()["error"]["code"]) == (403, "host_refused")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000", "10.0.0.7:80"])
def test_localhost_and_addresses_are_taken(live: Running, host: str) -> None:
    assert live.get("/v1/models", headers={"host": host}).status_code == 200


def test_pages_of_other_origins_are_refused(live: Running) -> None:
    for origin in ("https://evil.example", "null", live.url + "1", "file://"):
        found = live.post("/v1/completions", {"model": "tiny", "prompt": "hat"}, headers={"origin": origin})
        assert (found.status_code, found.json()["error"]["code"]) == (403, "origin_refused")
    assert live.get("/v1/models", headers={"origin": live.url}).status_code == 200


def test_hosts_and_origins_that_were_allowed(llama_base: Path) -> None:
    config = ServeConfig(allowed_hosts=("Models.Example",), allowed_origins=("https://page.example",))
    with running(served(llama_base), config) as live:
        assert live.get("/ready", headers={"host": "models.example:80"}).status_code == 200
        found = live.get("/v1/models", headers={"origin": "https://page.example"})
        assert found.headers["access-control-allow-origin"] == "https://page.example"
        assert live.get("/v1/models", headers={"origin": "https://other.example"}).status_code == 403
        asking = {"origin": "https://page.example", "access-control-request-method": "POST"}
        asked = httpx.options(f"{live.url}/v1/completions", headers=asking)
        assert asked.status_code == 200
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert [m["id"] for m in live.get("/v1/models").json()["data"]] == ["tiny"]
        loading = live.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "a"})
        assert "--adapters DIR" in loading.json()["error"]["message"]


@pytest.mark.parametrize(
    ("allowed", "origin"),
    [("*", "https://any.example"), ("https://Page.example/", "https://page.example"), ("http://a:80", "http://a:80")],
)
def test_origins_may_be_written_as_people_write_them(llama_base: Path, allowed: str, origin: str) -> None:
    async def scene() -> None:
        async with in_process(served(llama_base), ServeConfig(allowed_origins=(allowed,))) as (client, _):
            found = await client.get("/v1/models", headers={"origin": origin})
            assert found.status_code == 200
            assert found.headers["access-control-allow-origin"] in ("*", origin)

    asyncio.run(scene())


# ---------------------------------------------------------------------------------------------- keys


def test_an_admin_key_alone_guards_administration_and_nothing_else(llama_base: Path, adapters: Path) -> None:
    async def scene() -> None:
        config = ServeConfig(adapters=adapters, admin_key=("root",))
        async with in_process(served(llama_base), config) as (client, _):
            load = {"lora_name": "rot", "lora_path": "red"}
            root = {"authorization": "Bearer root"}
            assert (await client.get("/v1/models")).status_code == 200
            assert (await client.get("/v1/models", headers=root)).status_code == 200
            assert (await client.post("/v1/load_lora_adapter", json=load)).status_code == 401
            assert (await client.post("/v1/load_lora_adapter", json=load, headers=root)).status_code == 200

    asyncio.run(scene())


def test_keys(llama_base: Path, adapters: Path) -> None:
    config = ServeConfig(adapters=adapters, api_key=("one", "two"), admin_key=("root",))
    load = {"lora_name": "rot", "lora_path": "red"}

    def bearer(key: str) -> dict[str, Any]:
        return {"headers": {"authorization": f"Bearer {key}"}}

    with running(served(llama_base), config) as live:
        for path in ("/health", "/ready", "/metrics"):
            assert live.get(path).status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer three"},
            {"authorization": "Basic one"},
            {"authorization": "one"},
        ):
            found = live.get("/v1/models", headers=headers)
            assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
        assert live.get("/openapi.json").status_code == 401
        for key in ("one", "two", "root"):
            assert live.get("/v1/models", **bearer(key)).status_code == 200
        assert live.post("/v1/load_lora_adapter", load).status_code == 401
        assert live.post("/v1/load_lora_adapter", load, **bearer("one")).status_code == 403
        assert live.post("/v1/load_lora_adapter", load, **bearer("root")).status_code == 200
        assert live.post("/v1/unload_lora_adapter", {"lora_name": "rot"}, **bearer("two")).status_code == 403


def test_a_key_with_the_end_of_its_line_is_the_key(llama_base: Path) -> None:
    async def scene() -> None:
        config = ServeConfig(api_key=("one\n",), admin_key=(" root ",))
        async with in_process(served(llama_base), config) as (client, _):
            for key, status in (("one", 200), ("root", 200), ("other", 401), ("", 401)):
                found = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
                assert found.status_code == status

    asyncio.run(scene())


@pytest.mark.parametrize("key", ["", " ", "\n", "schlüssel", "one\ntwo", "one\x7f"])
@pytest.mark.parametrize("keys", ["api_key", "admin_key"])
def test_a_key_that_no_request_can_carry_is_refused(keys: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{keys} is empty or not") as refused:
        ServeConfig(**{keys: ("good", key)})
    assert "one" not in str(refused.value)


def test_keys_do_not_show() -> None:
    config = ServeConfig(api_key=("sesame",), admin_key=("sesame",))
    assert "sesame" not in repr(config)


# ---------------------------------------------------------------------------------------------- sizes and odd requests


def test_a_body_that_is_too_large_is_refused_announced_or_not(llama_base: Path) -> None:
    with running(served(llama_base), ServeConfig(max_body_mb=0.01)) as live:
        large = b'{"model": "tiny", "prompt": "' + b"x" * 20_000 + b'"}'
        for content in (large, iter([large[:9_000], large[9_000:]])):
            found = httpx.post(f"{live.url}/v1/completions", content=content)
            assert (found.status_code, found.json()["error"]["code"]) == (413, "too_large")
        assert live.post("/v1/completions", {"model": "tiny", "prompt": "hat"}).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 3000, b'"text"', b"\xff", b'{"model": 1e999}'])
def test_a_body_that_is_no_request_is_refused(live: Running, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    found = httpx.post(f"{live.url}/v1/chat/completions", content=body, headers=headers)
    assert found.status_code == 400
    assert found.json()["error"]["message"]


def test_unknown_routes_and_methods_answer_in_the_same_shape(live: Running) -> None:
    assert live.get("/v2/models").json()["error"]["type"] == "not_found_error"
    assert live.get("/v1/chat/completions").status_code == 405
    assert live.post("/v1/chat/completions", question("nobody")).json()["error"]["param"] == "model"


JUDGED_BY = [
    "not_a_server_error",
    "response_schema_conformance",
    "content_type_conformance",
    "status_code_conformance",
]


@pytest.mark.parametrize(
    ("mode", "examples", "more"),
    [(GenerationMode.POSITIVE, 6, []), (GenerationMode.NEGATIVE, 20, ["negative_data_rejection"])],
    ids=["right", "wrong"],
)
def test_the_api_does_what_its_own_description_says(
    live: Running, mode: GenerationMode, examples: int, more: list[str]
) -> None:
    """Schemathesis makes requests from the OpenAPI document, right ones and wrong ones, and judges the answers by it."""
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    operations = [op.ok() for op in schema.get_all_operations()]
    assert {op.path for op in operations} >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"}
    schemathesis.checks.load_all_checks()
    chosen = schemathesis.checks.CHECKS.get_by_names(JUDGED_BY + more)
    few = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for operation in operations:
        if mode.is_negative and not operation.body:  # nothing in it can be wrong
            continue

        @few
        @given(case=operation.as_strategy(mode))
        def one(case: Any) -> None:
            if mode.is_positive and isinstance(case.body, dict) and {"messages", "prompt"} & case.body.keys():
                case.body = {**case.body, "max_tokens": 2}  # an answer of a few tokens will do
            case.validate_response(case.call(timeout=30), checks=chosen)

        one()


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("wrong", [{"streams": 0}, {"max_queued": -1}, {"port": 70_000}, {"deadline_seconds": 0.0}])
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServeConfig(**wrong)
