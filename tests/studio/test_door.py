"""Who may use a Studio, and what may be uploaded to it."""

from __future__ import annotations

import gzip
import http.client
import pickle
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from studio_app import Live, open_studio, sentence
from warm_cli import WarmCli

from twofold.studio.run import address_of
from twofold.studio.settings import StudioConfig, with_token

pytest_plugins = ("tiny_fixtures",)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:80"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_pages_of_others_are_refused(live: Live, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/api/about"), ("POST", "/api/plan")):
        found = httpx.request(method, live.url + path, headers=headers)
        assert found.status_code == 403
        assert sentence(found)


def test_its_own_page_is_let_in(live: Live) -> None:
    own = {"origin": live.url, "sec-fetch-site": "same-origin"}
    found = live.get("/api/about", headers=own)
    assert found.status_code == 200
    assert "default-src 'self'" in found.headers["content-security-policy"]


def test_a_token_is_asked_for_where_others_could_come() -> None:
    assert with_token(StudioConfig()).token is None
    made = with_token(StudioConfig(host="0.0.0.0"))
    assert made.token is not None
    assert len(made.token) == 32
    assert address_of(made, 80).endswith(f"?token={made.token}")


def test_the_token_opens_the_page_once_and_stays_as_a_cookie(tmp_path: Path) -> None:
    with open_studio(tmp_path, token="abc123") as found:
        assert found.get("/api/about").status_code == 401
        assert "token" in sentence(found.get("/"))
        assert found.get("/api/about", headers={"authorization": "Bearer abc123"}).status_code == 200
        assert found.get("/api/about", headers={"authorization": "Bearer abc124"}).status_code == 401
        with httpx.Client(base_url=found.url) as browser:
            entered = browser.get("/", params={"token": "abc123"})
            assert entered.headers["location"] == "/"
            assert "httponly" in entered.headers["set-cookie"].lower()
            assert browser.get("/api/about").status_code == 200


# ---------------------------------------------------------------------------------------------- uploads


def put(live: Live, name: str, content: bytes) -> httpx.Response:
    return httpx.post(live.url + "/api/uploads", params={"name": name}, content=content, timeout=60)


def uploads(live: Live) -> set[str]:
    folder = live.root / "uploads"
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


def test_examples_are_kept_and_counted(live: Live) -> None:
    content = (live.root / "data.jsonl").read_bytes()
    found = put(live, "My data (1).JSONL", content).json()
    assert found["examples"] == 23
    assert found["path"] == "work/uploads/My-data-1.jsonl"
    assert found["format"] == "messages"
    assert (live.root / "uploads" / "My-data-1.jsonl").read_bytes() == content
    assert put(live, "My data (1).jsonl", content).json()["path"] == "work/uploads/My-data-1-2.jsonl"


@pytest.mark.parametrize(
    "name",
    [
        "../../../outside.jsonl",
        "/etc/cron.d/x.jsonl",
        "..\\..\\outside.jsonl",
        "a\0b.jsonl",
        "-rf.jsonl",
        "x" * 400 + ".jsonl",
    ],
)
def test_hostile_names_stay_inside(live: Live, name: str) -> None:
    before = {p for p in live.root.parent.rglob("*") if p.parent != live.root / "uploads"}
    found = put(live, name, (live.root / "data.jsonl").read_bytes())
    assert found.status_code == 201
    kept = Path(found.json()["path"])
    assert kept.parent == Path("work/uploads")
    assert len(kept.name) < 120
    assert {p for p in live.root.parent.rglob("*") if p.parent != live.root / "uploads"} - before <= {
        live.root / "uploads"
    }


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.pkl", b"x", "is no .jsonl"),
        ("noending", b"x", "is no .jsonl"),
        (".jsonl", b"x", "is no .jsonl"),
        ("??.jsonl", b"x", "cannot name"),
        ("a.jsonl", pickle.dumps({"a": 1}), "pickle"),
        ("a.csv", b"PK\x03\x04rest", "zip"),
        ("a.json", gzip.compress(b"{}", mtime=0), "gzip"),
        ("a.parquet", b"not parquet", "no Parquet"),
        ("a.jsonl", b"ab\0cd", "binary"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"{broken\n", "not valid JSON"),
        ("a.jsonl", b'{"colour": "red"}\n', "no known format"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "UTF-8"),
    ],
)
def test_wrong_files_get_a_sentence_and_are_not_kept(live: Live, name: str, content: bytes, said: str) -> None:
    before = uploads(live)
    found = put(live, name, content)
    assert found.status_code == 400
    assert said in sentence(found)
    assert str(live.root) not in sentence(found)
    assert uploads(live) == before


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Live]:
    (tmp_path / "work").mkdir()
    with open_studio(tmp_path / "work", max_upload_mb=0.01) as found:
        yield found


def test_files_that_are_too_large_are_refused_before_and_while_they_come(small: Live) -> None:
    connection = http.client.HTTPConnection(urlsplit(small.url).netloc)
    connection.putrequest("POST", "/api/uploads?name=a.jsonl")
    connection.putheader("content-length", str(2 * 2**30))
    connection.endheaders()
    answer = connection.getresponse()  # nothing of the two gigabytes was sent
    assert answer.status == 413
    assert b"--max-upload-mb" in answer.read()

    def pieces() -> Iterator[bytes]:
        yield from (b'{"text": "x"}\n' for _ in range(2000))

    found = httpx.post(small.url + "/api/uploads", params={"name": "a.jsonl"}, content=pieces())
    assert found.status_code == 413
    assert uploads(small) == set()


def test_the_command_says_what_is_wrong(cli: WarmCli, tmp_path: Path) -> None:
    assert "no folder at" in cli("studio", "--root", tmp_path / "none", "--no-open").refusal()
    assert "did you mean '--port'" in cli("studio", "--prt", 3).refusal()
    assert "letters and digits" in cli("studio", "--token", "a b").refusal()
