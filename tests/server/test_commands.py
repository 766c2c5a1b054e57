"""`twofold serve`, `twofold chat --url`, and every command of docs/serving.md."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_server import Running, running, served
from warm_cli import WarmCli

from twofold.cli.flags import parse
from twofold.cli.remote import first_model, stream_remote
from twofold.engine.request import Sampling
from twofold.errors import ConfigError
from twofold.recipes.generate import GenerationConfig
from twofold.recipes.serve import ServeConfig
from twofold.server.openai import ChatRequest

pytest_plugins = ("tiny_fixtures", "server_fixtures")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serving.md"


def test_chat_talks_to_a_server(cli: WarmCli, live: Running) -> None:
    said = "import sys, io; sys.stdin = io.StringIO('colour of the cup 1?\\n')"
    found = cli("chat", "--url", live.url, "--model", "red", "--max-new-tokens", 8, setup=said)
    assert found.code == 0, found.stderr
    assert found.stdout.removesuffix("\n") == live.say("red", ignore_eos=False)
    base = cli("chat", "--url", f"{live.url}/v1", "--max-new-tokens", 8, setup=said)
    assert base.stdout.removesuffix("\n") == live.say("tiny", ignore_eos=False)


def test_chat_tells_what_a_server_refuses(cli: WarmCli, live: Running) -> None:
    said = "import sys, io; sys.stdin = io.StringIO('hat?\\n')"
    wrong = cli("chat", "--url", live.url, "--model", "rad", setup=said)
    assert wrong.code == 2
    assert "did you mean 'red'" in wrong.stderr
    assert "no server answers" in cli("chat", "--url", "http://127.0.0.1:9", setup=said).refusal()
    for flag, value in (("--adapter", "red"), ("--base", "other"), ("--dtype", "float32")):
        said = cli("chat", "--url", live.url, flag, value).refusal()
        assert flag in said
        assert "--model NAME" in said
    assert "http://" in cli("chat", "--url", "localhost:8000").refusal()


EVENT = b'{"choices": [{"delta": {"content": "half an "}}]}'


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], list[Any]]:
    """Let another server answer: every request gets these lines, and is kept."""

    def answers(body: bytes) -> list[Any]:
        asked: list[Any] = []

        def urlopen(request: Any, timeout: float) -> io.BytesIO:
            asked.append(request.data and json.loads(request.data))
            return io.BytesIO(body)

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        return asked

    return answers


def test_a_server_is_told_every_setting(other: Callable[[bytes], list[Any]]) -> None:
    asked = other(b"data:" + EVENT + b"\n\ndata:[DONE]\n\n")
    sampling = Sampling(
        min_p=0.2, top_k=3, repetition_penalty=1.3, presence_penalty=1.0, frequency_penalty=-1.0, logit_bias={5: 3.0}
    )
    config = GenerationConfig(sampling=sampling)
    assert "".join(stream_remote("http://other", "m", [], config)) == "half an "
    assert ChatRequest.model_validate(asked[0] | {"messages": [{"role": "user"}]}).logit_bias == {"5": 3}
    chosen = ("min_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "seed")
    assert {n: asked[0][n] for n in chosen} == {n: getattr(sampling, n) for n in chosen}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"data: " + EVENT + b"\n\n", "in the middle"),
        (b"data: {broken\n\n", "broken"),
        (b'data: {"error": {"message": "full"}}', "full"),
    ],
)
def test_an_answer_that_is_cut_off_is_no_whole_one(
    other: Callable[[bytes], list[Any]], body: bytes, words: str
) -> None:
    other(body)
    with pytest.raises(ConfigError, match=words):
        list(stream_remote("http://other", "m", [], GenerationConfig()))


@contextlib.contextmanager
def always_saying(reply: bytes) -> Iterator[str]:
    """A server on loopback that answers every request with these bytes and hangs up; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def reply(body: bytes, status: int = 200, more: int = 0) -> bytes:
    """A whole response, or one that announces more than comes."""
    return f"HTTP/1.1 {status} x\r\ncontent-length: {len(body) + more}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no server answers"),
        (reply(b'{"data": ', more=100), "lists no models"),
        (reply(b'{"error":', status=500, more=100), "says: status 500"),
    ],
)
def test_what_answers_strangely_is_told_in_a_sentence(said: bytes, words: str) -> None:
    with always_saying(said) as url, pytest.raises(ConfigError, match=words):
        first_model(url)


@pytest.mark.parametrize("event", ["5", '{"error": "busy"}', '{"usage": {}}', '{"choices": [{"delta": null}]}'])
def test_an_event_that_is_none_of_an_answer_is_shown(event: str) -> None:
    with always_saying(reply(f"data: {event}\n\n".encode())) as url, pytest.raises(ConfigError) as refused:
        list(stream_remote(url, "m", [], GenerationConfig()))
    assert str(refused.value) == f"{url} sent an event that is none of an answer: {event!r}"


@pytest.mark.parametrize(
    "url", ["http://localhost:abc", "http://localhost:80 80", "http://127.0.0.1:9/\u00fc", "http://["]
)
def test_an_address_that_is_none_is_told_in_a_sentence(url: str) -> None:
    with pytest.raises(ConfigError, match="no server answers at"):
        first_model(url)


def test_the_key_is_what_stands_in_its_line_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with always_saying(reply(b'{"data": [{"id": "m"}]}')) as url:
        monkeypatch.setenv("TWOFOLD_API_KEY", "secret\n")
        assert first_model(url) == "m"
        for key in ("schl\u00fcssel", "se\ncret", "schl\u20acssel"):
            monkeypatch.setenv("TWOFOLD_API_KEY", key)
            with pytest.raises(ConfigError, match="TWOFOLD_API_KEY is empty or not") as refused:
                first_model(url)
            assert "ssel" not in str(refused.value)
            assert "cret" not in str(refused.value)


@pytest.mark.parametrize("page", [b"<html>hello</html>", b"[]", b'{"data": []}'])
def test_what_lists_no_models_is_no_server_for_chat(other: Callable[[bytes], list[Any]], page: bytes) -> None:
    other(page)
    with pytest.raises(ConfigError, match="lists no models"):
        first_model("http://other")


def test_serve_refuses_what_it_cannot_do(cli: WarmCli, llama_base: Path, tmp_path: Path) -> None:
    assert "no adapter folder" in cli("serve", "--base", llama_base, "--adapters", tmp_path / "no").refusal()
    assert "was made for 256" in cli("serve", "--base", llama_base, "--context", 5000).refusal()
    assert "did you mean '--adapters'" in cli("serve", "--adapter", "x").refusal()


def test_serve_says_before_it_loads_a_base_what_it_will_not_find(cli: WarmCli, live: Running, tmp_path: Path) -> None:
    base = ("serve", "--base", tmp_path / "no-base")
    assert "cannot load an encoder from nowhere" in cli(*base, "--embeddings", "nowhere").refusal()
    port = live.url.rpartition(":")[2]
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in cli(*base, "--port", port).refusal()
    assert "--host" in cli(*base, "--host", "192.0.2.1").refusal()


@pytest.fixture
def folder(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader of the page would stand: a trained adapter and the examples."""
    shutil.copytree(adapters / "red", tmp_path / "runs" / "quickstart" / "adapter")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_page_does_what_it_says(
    folder: Path, llama_base: Path, cli: WarmCli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`twofold serve` runs in this process, on a tiny base; what follows it goes to that server."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    commands = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    with contextlib.ExitStack() as until_the_end:
        url = ""
        for command in commands:
            words = shlex.split(command.replace("http://localhost:8000", url))
            match words:
                case ["twofold", "serve", *flags]:
                    config = parse(ServeConfig, flags, verb="serve", description="")
                    url = until_the_end.enter_context(running(served(llama_base), config)).url
                case ["echo", said, "|", "twofold", "chat", *flags]:
                    found = cli("chat", *flags, setup=f"import sys, io; sys.stdin = io.StringIO({said!r})")
                    assert found.code == 0, found.stderr
                case ["python", "-c", code]:
                    exec(code, {})
                    assert "intents@" in capsys.readouterr().out
                case ["python", script, *arguments]:
                    monkeypatch.setattr(sys, "argv", [script, *arguments])
                    runpy.run_path(script)
                    assert "models: tiny" in capsys.readouterr().out
                case _:
                    done = subprocess.run(words, capture_output=True, text=True, check=False)
                    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert {p.name.partition("@")[0] for p in (folder / "adapters").iterdir()} == {
        "facts",
        "intents",
        "intents.current",
    }
