"""The run folder: config.yaml, preflight.json, events.jsonl, checkpoints/, adapter/, report.json, report.html."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from twofold import atomic
from twofold.config import as_dict, write_yaml
from twofold.errors import RunError
from twofold.events import Emit, Event, Progress
from twofold.recipes.settings import TrainConfig, read_config
from twofold.training import checkpoint


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it makes."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def last_adapter(self) -> Path:
        return self.path / "adapter-last"

    @property
    def model(self) -> Path:
        """Of full fine-tuning, in place of `adapter`."""
        return self.path / "model"

    @property
    def last_model(self) -> Path:
        return self.path / "model-last"

    @property
    def preflight(self) -> Path:
        return self.path / "preflight.json"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    def withdraw(self) -> None:
        """Take back a run that ended before its first step, so that the mended configuration can begin."""
        if not any(record["event"] == "step" for record in self.recorded()):
            for file in (self.config, self.events, self.preflight):
                file.unlink(missing_ok=True)

    def require_same(self, now: dict[str, Any]) -> None:
        """Raises RunError unless data and base are those that the run's pre-flight recorded."""
        began = json.loads(self.preflight.read_text())
        sets = {"training examples": "train", "held-out examples": "evaluation"}
        changed = [what for what, key in sets.items() if _digest(began[key]) != _digest(now[key])]
        changed += ["base"] if began["base"] != now["base"] else []
        if changed:
            raise RunError(
                f"{self.path} was started with other data: its {' and '.join(changed)} changed since; put the old ones "
                "back (a template that prints the date changes them too), or choose another output for a new run"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time; the lock goes with the process, however it ends."""
        with self._opened_lock() as file:
            try:
                _lock(file)
            except OSError as error:
                busy = f"another process is at work in {self.path}; wait for it or choose another output"
                raise RunError(busy) from error
            try:
                yield
            finally:
                self.lock.unlink(missing_ok=True)
                with suppress(OSError):  # it holds something, as it should
                    self.path.rmdir()

    def _opened_lock(self) -> IO[str]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return self.lock.open("w")
        except OSError as error:
            raise RunError(atomic.cannot_write(self.path, error)) from error

    def recorded(self) -> list[dict[str, Any]]:
        """The events so far; a line that a crash cut short or damaged does not count."""
        if not self.events.is_file():
            return []
        found = map(event_of, self.events.read_bytes().split(b"\n")[:-1])
        return [event for event in found if event is not None]


def event_of(line: bytes) -> dict[str, Any] | None:
    """The event in a line of events.jsonl; None where it holds none, as after a power loss or on a full disk."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def in_use(run: RunFolder) -> bool:
    """Whether a process is at work in a run's folder."""
    try:
        with run.lock.open() as file:
            _lock(file)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _lock(file: IO[str]) -> None:
    """Raises OSError if another process holds the file; where the system has no such locks, nothing is held."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _digest(report: dict[str, Any] | None) -> str | None:
    return None if report is None else report["digest"]


def open_new(config: TrainConfig) -> RunFolder:
    """Begin a run in a fresh folder.

    Raises:
        RunError: the folder holds a run already, or cannot be written.
    """
    run = RunFolder(Path(config.output))
    if run.config.exists():
        raise RunError(f"{run.path} holds a run already; pass --resume to go on with it, or choose another output")
    atomic.write_text(run.config, write_yaml(config))
    return run


def as_begun(config: TrainConfig) -> TrainConfig:
    """`auto` as the run in the output folder made it definite: what was measured then holds when it goes on."""
    run = RunFolder(Path(config.output))
    if not run.config.exists():
        return config
    before = read_config(run.config)
    dtype = before.dtype if config.dtype == "auto" else config.dtype
    return replace(config, dtype=dtype, device=before.device if config.device == "auto" else config.device)


def open_resumed(config: TrainConfig) -> tuple[RunFolder, Path | None]:
    """Go on with a run: its folder, and its newest checkpoint if it has one. Events after that are forgotten.

    Raises:
        RunError: the run is finished, or was started with another configuration.
    """
    run = RunFolder(Path(config.output))
    if not run.config.exists():
        return open_new(config), None
    if run.report.exists():
        made = run.model if config.full else run.adapter
        raise RunError(f"the run in {run.path} is finished; its {made.name} is in {made}")
    differing = _differences(read_config(run.config), config)
    if differing:
        raise RunError(
            f"{run.path} was started with other settings ({', '.join(differing)}); resume with its config.yaml"
        )
    checkpoint.remove_partial(run.checkpoints)
    newest = checkpoint.newest(run.checkpoints)
    step = checkpoint.step_of(newest) if newest else 0
    kept = [r for r in run.recorded() if r.get("step", 0) <= step]
    atomic.write_text(run.events, "".join(json.dumps(r) + "\n" for r in kept))
    return run, newest


def _differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    """Top-level keys whose values differ; a run folder may have been moved, or be called by another path, and other
    processes may share the work in another way."""
    a, b = as_dict(before), as_dict(replace(now, training=replace(now.training, parallel=before.training.parallel)))
    return [k for k in a if a[k] != b[k] and k != "output"]


class EventLog:
    """Appends every event but progress to events.jsonl, a line each, as it happens."""

    def __init__(self, run: RunFolder) -> None:
        self._file: IO[str] = run.events.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Progress):
            try:
                self._file.write(json.dumps({**event.record(), "time": round(time.time(), 3)}) + "\n")
                self._file.flush()
            except OSError as error:
                raise RunError(
                    f"cannot write {self._file.name}: {error.strerror}; free space, then --resume"
                ) from error

    def close(self) -> None:
        self._file.close()


@contextmanager
def trackers(config: TrainConfig, run: RunFolder) -> Iterator[list[Emit]]:
    """Subscribers for the trackers that the configuration asks for, closed at the end of the run.

    Raises:
        ConfigError: the package of one is not installed.
    """
    from twofold.recipes.trackers import tensorboard, weights_and_biases

    known = {"tensorboard": tensorboard, "wandb": weights_and_biases}
    with ExitStack() as open_ones:
        yield [tolerated(name, open_ones.enter_context(known[name](run.path))) for name in config.trackers]


def tolerated(name: str, tracker: Emit) -> Emit:
    """A tracker whose failure is said once and does not end the training."""
    working = [tracker]

    def emit(event: Event) -> None:
        try:
            for subscriber in working:
                subscriber(event)
        except Exception as error:
            working.clear()
            warnings.warn(f"tracker {name} failed and is left out from here on: {error}", stacklevel=2)

    return emit
