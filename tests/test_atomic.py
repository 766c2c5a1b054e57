"""Files and folders that are whole or absent: full disks, places in the way, and death in the middle, all for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from twofold import atomic, tensorfile
from twofold.errors import AdapterFileError, RunError
from twofold.events import finished
from twofold.tensorfile import TensorFile, nonfinite, write_tensors


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A Python of its own, for limits and deaths that must not hit this one."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_files_and_folders_appear_whole(tmp_path: Path) -> None:
    with atomic.new_file(tmp_path / "deep" / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "deep" / "a.txt").exists()
        assert temporary.name.startswith(".")
        inode = temporary.stat().st_ino
    assert (tmp_path / "deep" / "a.txt").read_text() == "new"
    assert (tmp_path / "deep" / "a.txt").stat().st_ino == inode, "renamed, not copied: a copy can be cut short"
    with atomic.new_folder(tmp_path / "b" / "folder") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "b" / "folder").exists()
    assert names(tmp_path / "b") == ["folder"]
    assert names(tmp_path / "deep") == ["a.txt"]


@pytest.mark.parametrize("error", [KeyError, OSError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("old")
    atomic.write_text(tmp_path / "folder" / "x", "old")

    def fail_in_a_file() -> None:
        with atomic.new_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise error

    def fail_in_a_folder() -> None:
        with atomic.new_folder(tmp_path / "folder", replace=True) as temporary:
            (temporary / "x").write_text("half")
            raise error

    for fail in (fail_in_a_file, fail_in_a_folder):
        with pytest.raises(RunError if error is OSError else error):
            fail()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "folder" / "x").read_text() == "old"
    assert names(tmp_path) == ["a.txt", "folder"]


def test_a_process_killed_in_the_middle_leaves_only_a_dotted_name(tmp_path: Path) -> None:
    done = run(
        """
        import os, signal, sys
        from pathlib import Path
        from twofold import atomic
        with atomic.new_folder(Path(sys.argv[1]), replace=True) as temporary:
            (temporary / "x").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path / "run",
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "run").exists()
    assert all(n.startswith(".run.") and n.endswith(".partial") for n in names(tmp_path))


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from twofold import atomic
from twofold.errors import RunError
from twofold.tensorfile import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
folder = Path(sys.argv[1])
def in_folder():
    with atomic.new_folder(folder / "run") as temporary:
        write_tensors(temporary / "t.safetensors", {"a": torch.zeros(5000)})
for write in (
    lambda: atomic.write_text(folder / "a.txt", "x" * 10000),
    lambda: write_tensors(folder / "t.safetensors", {"a": torch.zeros(5000)}),
    in_folder,
):
    try:
        write()
    except RunError as error:
        print(error)
"""


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the kernel refuses the write in the same place."""
    (tmp_path / "a.txt").write_text("old")
    done = run(FULL, tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line, name in zip(lines, ("a.txt", "t.safetensors", "run/t.safetensors"), strict=True):
        assert f"cannot write {tmp_path / name}" in line
        assert "free space or choose another output folder" in line
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("place", ["file/below.txt", "file/deeper/below.txt"])
def test_a_file_where_a_folder_should_be_is_told(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=f"cannot write .*{place}"):
        atomic.write_text(tmp_path / place, "x")

    def folder() -> None:
        with atomic.new_folder(tmp_path / place):
            pass

    with pytest.raises(RunError, match=f"cannot write .*{place}"):
        folder()
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that even root cannot write")
def test_a_read_only_place_is_told() -> None:
    with pytest.raises(RunError, match=r"cannot write /proc/twofold\.txt"):
        atomic.write_text(Path("/proc/twofold.txt"), "x")

    def folder() -> None:
        with atomic.new_folder(Path("/proc/twofold")):
            pass

    with pytest.raises(RunError, match="cannot write /proc/twofold"):
        folder()


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "run" / "old", "1")

    def make(*, replace: bool) -> None:
        with atomic.new_folder(tmp_path / "run", replace=replace) as temporary:
            (temporary / "new").write_text("2")

    with pytest.raises(RunError, match="exists already"):
        make(replace=False)
    assert names(tmp_path / "run") == ["old"]
    make(replace=True)
    assert names(tmp_path / "run") == ["new"]
    assert names(tmp_path) == ["run"]


def test_a_file_gives_way_to_a_folder_without_crumbs(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file of that name")
    with atomic.new_folder(tmp_path / "run", replace=True) as temporary:
        (temporary / "new").write_text("2")
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["new"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "run" / "old", "1")

    def vanish() -> None:
        with atomic.new_folder(tmp_path / "run", replace=True) as temporary:
            temporary.rename(tmp_path / "elsewhere")

    with pytest.raises(RunError):
        vanish()
    assert names(tmp_path / "run") == ["old"]


def test_json_is_the_same_bytes_for_the_same_values(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "a", {"b": 1, "a": {"d": "é", "c": [1.5]}})
    atomic.write_json(tmp_path / "b", {"a": {"c": [1.5], "d": "é"}, "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "é" in (tmp_path / "a").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------- tensors


def test_tensors_come_back_in_type_and_bits_whatever_their_order(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    tensors = {"b": x.bfloat16(), "a": x.T, "whole": x, "part": x[1:3], "empty": torch.zeros(0, 3)}
    write_tensors(tmp_path / "one", tensors)
    write_tensors(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    file = TensorFile(tmp_path / "one")
    assert file.shapes == {n: tuple(t.shape) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        assert file.read(name).dtype is tensor.dtype
        assert torch.equal(file.read(name), tensor)


def test_tensors_may_be_read_by_whoever_may_read_the_other_files(tmp_path: Path) -> None:
    write_tensors(tmp_path / "tensors", {"x": torch.ones(2)})
    atomic.write_text(tmp_path / "text", "x")
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "text").stat().st_mode


def test_files_that_are_not_tensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00nonsense")
    with pytest.raises(AdapterFileError, match="damaged or not a safetensors file"):
        TensorFile(tmp_path / "a")
    with pytest.raises(AdapterFileError, match="none does not exist"):
        TensorFile(tmp_path / "none")
    with pytest.raises(AdapterFileError, match="does not exist"):
        TensorFile(tmp_path)


def test_a_file_is_looked_through_for_what_is_not_finite_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorfile, "SUMMED_BYTES", 4096)
    summed, inner = [], torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda part: summed.append(part.nbytes) or inner(part))
    write_tensors(tmp_path / "large", {str(i): torch.ones(3000) for i in range(5)})
    assert len(list(TensorFile(tmp_path / "large").checking_finite())) == len(summed) == 15
    assert max(summed) == 4096
    assert sum(summed) == 5 * 12_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 1024, 2999])
def test_what_is_not_finite_is_found_in_every_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float, at: int
) -> None:
    monkeypatch.setattr(tensorfile, "SUMMED_BYTES", 4096)
    values = torch.ones(3000)
    write_tensors(tmp_path / "good", {"a": values})
    values[at] = bad
    write_tensors(tmp_path / "bad", {"a": values})
    assert finished(TensorFile(tmp_path / "good").checking_finite())
    assert not finished(TensorFile(tmp_path / "bad").checking_finite())


def test_nonfinite_names_the_tensors() -> None:
    bad = {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")]), "c": torch.tensor([float("-inf")])}
    assert nonfinite(bad) == ["b", "c"]
