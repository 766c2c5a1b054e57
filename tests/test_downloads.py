"""Downloads, with pip for real but without a network: the wheels are made here and found through PIP_FIND_LINKS."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from twofold.downloads import cache_folder, wheel_file
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
    assert [type(event) for event in events] == [Message, Progress, Message]

    for wheel in shelf.iterdir():
        wheel.unlink()
    events.clear()
    assert wheel_file("lamp-data", "1.0", MEMBER, DIGEST, events.append) == path
    assert events == []


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
