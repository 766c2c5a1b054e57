"""Downloads, with pip for real but without a network: the wheels are made here and found through PIP_FIND_LINKS."""

from __future__ import annotations

import hashlib
import http.server
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from twofold.downloads import cache_folder, source_file, wheel_file, wheel_files
from twofold.errors import DownloadError
from twofold.events import Event, Message, Progress, Warned, silent

CONTENT = b'{"lamp": "on"}\n'
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MEMBER = "lamp_data/data/lamp.json"


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip can see, and an empty cache."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    _make_wheel(folder)
    return folder


def _make_wheel(folder: Path) -> None:
    info = "lamp_data-1.0.dist-info"
    with zipfile.ZipFile(folder / "lamp_data-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, CONTENT)
        wheel.writestr("lamp_data/__init__.py", "raise RuntimeError('nothing of a package is ever run')\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: lamp-data\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def _files_in_cache() -> list[Path]:
    return [path for path in cache_folder().rglob("*") if path.is_file()]


def test_fetches_once_then_reads_the_cache(shelf: Path) -> None:
    events: list[Event] = []
    path = wheel_file("lamp-data", "1.0", MEMBER, DIGEST, events.append)
    assert path.read_bytes() == CONTENT
    assert _files_in_cache() == [path], "only the member asked for is kept"
    assert list(dict.fromkeys(type(event) for event in events)) == [Progress, Message]

    for wheel in shelf.iterdir():
        wheel.unlink()
    events.clear()
    assert wheel_file("lamp-data", "1.0", MEMBER, DIGEST, events.append) == path
    assert events == []


class SlowIndex(http.server.BaseHTTPRequestHandler):
    """A package index of one wheel, which takes its time to send it."""

    wheel: Path
    seconds = 1.0

    def do_GET(self) -> None:
        link = f'<a href="/{self.wheel.name}">{self.wheel.name}</a>'.encode()
        content = self.wheel.read_bytes() if self.path.endswith(".whl") else link
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if self.path.endswith(".whl") else "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        pieces = range(0, len(content), max(1, len(content) // 20))
        for start in pieces:
            self.wfile.write(content[start : start + pieces.step])
            time.sleep(self.seconds / 20 if len(content) > 1000 else 0)

    def handle(self) -> None:
        with suppress(ConnectionError):  # pip is gone
            super().handle()

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def slow_index(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The wheel, padded to 3 MB, is on that index alone."""
    wheel = shelf / "lamp_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("lamp_data/padding", bytes(3_000_000))
    SlowIndex.wheel = wheel.rename(tmp_path / wheel.name)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowIndex) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip-cache"))
        yield SlowIndex.wheel
        server.shutdown()


def test_a_slow_download_is_seen_to_advance(slow_index: Path) -> None:
    events: list[Event] = []
    wheel_file("lamp-data", "1.0", MEMBER, DIGEST, events.append)
    size = slow_index.stat().st_size
    fetched = [e for e in events if isinstance(e, Progress) and e.task == "fetching lamp-data 1.0 (bytes)"]
    between = [e for e in fetched if 0.01 * size < e.done < 0.95 * size]
    done = [e.done for e in between]
    assert done == sorted(done)
    assert len(set(done)) > 1
    assert {e.total for e in between} == {round(size, -5)}, "pip says 3.0 MB"
    assert (fetched[-1].done, fetched[-1].total) == (size, size)


def test_an_interrupted_download_takes_pip_down_and_leaves_nothing(slow_index: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.done:
            raise KeyboardInterrupt

    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(KeyboardInterrupt):
        wheel_file("lamp-data", "1.0", MEMBER, DIGEST, interrupt)
    assert set(psutil.Process().children(recursive=True)) == before
    assert [path.name for path in cache_folder().rglob("*")] == ["packages"]


def test_a_damaged_copy_is_fetched_again() -> None:
    path = wheel_file("lamp-data", "1.0", MEMBER, DIGEST, silent)
    path.write_bytes(b"half")
    events: list[Event] = []
    assert wheel_file("lamp-data", "1.0", MEMBER, DIGEST, events.append).read_bytes() == CONTENT
    assert isinstance(events[0], Warned)


def test_unknown_version_names_the_package_and_the_way_out() -> None:
    with pytest.raises(DownloadError, match=r"lamp-data 9\.9: pip says .*lamp-data==9\.9.*PIP_FIND_LINKS"):
        wheel_file("lamp-data", "9.9", MEMBER, DIGEST, silent)
    assert _files_in_cache() == []


def test_wrong_digest_is_refused_and_leaves_nothing() -> None:
    with pytest.raises(DownloadError, match="was deleted"):
        wheel_file("lamp-data", "1.0", MEMBER, "0" * 64, silent)
    assert _files_in_cache() == []
    assert [path.name for path in cache_folder().rglob("*")] == ["packages"]


def test_missing_member_suggests_the_nearest() -> None:
    with pytest.raises(DownloadError, match=f"did you mean '{MEMBER}'"):
        wheel_file("lamp-data", "1.0", "lamp_data/data/lamps.json", None, silent)
    assert _files_in_cache() == []


def test_damaged_wheel_is_refused(shelf: Path) -> None:
    wheel = shelf / "lamp_data-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(DownloadError, match="lamp"):
        wheel_file("lamp-data", "1.0", MEMBER, DIGEST, silent)
    assert _files_in_cache() == []


def test_unwritable_cache_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_file").write_text("in the way")
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "a_file"))
    with pytest.raises(DownloadError, match="set TWOFOLD_CACHE"):
        wheel_file("lamp-data", "1.0", MEMBER, DIGEST, silent)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TWOFOLD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "twofold"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "twofold"


def test_several_files_of_a_wheel_are_fetched_at_once(shelf: Path) -> None:
    folder = wheel_files("lamp-data", "1.0", {MEMBER: DIGEST, "lamp_data/__init__.py": None}, silent)
    assert (folder / MEMBER).read_bytes() == CONTENT
    assert len(_files_in_cache()) == 2
    for wheel in shelf.iterdir():
        wheel.unlink()
    assert wheel_files("lamp-data", "1.0", {MEMBER: DIGEST}, silent) == folder


def test_a_source_archive_of_another_digest_is_refused_before_it_runs(shelf: Path, tmp_path: Path) -> None:
    source = tmp_path / "lamp-src-1.0"
    source.mkdir()
    ran = tmp_path / "ran"
    (source / "setup.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    archive = shelf / "lamp-src-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "lamp-src-1.0")
    with pytest.raises(DownloadError, match=r"cannot fetch lamp-src 1\.0"):
        source_file("lamp-src", "1.0", "0" * 64, "setup.py", DIGEST, silent)
    assert not ran.exists()
