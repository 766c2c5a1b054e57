"""The runs of a Studio: folders on disk, each with the training process that was last started in it.

Nothing about a run is kept in memory: whoever looks reads the folder, so a reload, a second tab or a restarted Studio sees the
same.
Beside what training writes, a run holds `studio/`: the configuration that was asked for, the process, and what it said.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from twofold import atomic
from twofold.config import write_yaml
from twofold.errors import RunError, UserError
from twofold.recipes.runs import RunFolder, in_use
from twofold.recipes.settings import TrainConfig, read_config
from twofold.server.errors import ApiError
from twofold.studio import process
from twofold.studio.configuration import shown_config
from twofold.studio.process import Noted
from twofold.studio.records import last_records
from twofold.studio.roots import Roots

State: TypeAlias = Literal["starting", "running", "stopping", "stopped", "finished", "failed"]
ENDED: tuple[State, ...] = ("stopped", "finished", "failed")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FOLDER = "runs"
SAID = "twofold: "
"""What the last sentence of a failed command begins with."""
KILLED = (
    "the training process ended without a word: it was killed, or the machine ran out of memory; resume goes on from "
    "its newest checkpoint"
)


@dataclass(frozen=True)
class RunState:
    """How a run stands."""

    state: State
    message: str | None = None


@dataclass(frozen=True)
class Run:
    """A run's folder, and what Studio keeps in it."""

    path: Path

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def asked(self) -> Path:
        """The configuration that was asked for."""
        return self.path / "studio" / "config.yaml"

    @property
    def note(self) -> Path:
        return self.path / "studio" / "process.json"

    @property
    def log(self) -> Path:
        return self.path / "studio" / "log.txt"

    @property
    def config(self) -> Path:
        """The configuration as training made it definite, or as it was asked for."""
        return self.folder.config if self.folder.config.is_file() else self.asked

    def state(self) -> RunState:
        """As its folder and its process say."""
        noted = process.noted(self.note)
        if noted is not None and noted.alive:
            return self._alive(noted)
        if self.folder.report.is_file():
            return RunState("finished")
        if noted is None and in_use(self.folder):
            return RunState("running", "it was started elsewhere")
        if last_records(self.folder.events, ("stopped",), within=1):
            return RunState("stopped")
        return RunState("failed", self.sentence() or KILLED)

    def _alive(self, noted: Noted) -> RunState:
        if noted.stopping:
            return RunState("stopping", "it ends its step and writes a checkpoint")
        prepared = last_records(self.folder.events, ("prepared",))
        if prepared and prepared[-1].get("time", 0) >= noted.started:
            return RunState("running")
        return RunState("starting", self._last_line())

    def sentence(self) -> str | None:
        """What its last process said when it failed."""
        said = [line for line in self._lines() if line.startswith(SAID)]
        return said[-1].removeprefix(SAID) if said else None

    def _last_line(self) -> str | None:
        return next((line.strip() for line in reversed(self._lines()) if line.strip()), None)

    def _lines(self) -> list[str]:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 20_000))
                return file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return []


class RunBook:
    """The runs of the first root.

    Args:
        roots: the first takes the runs.
    """

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.folder = roots.home / FOLDER
        self._one_at_a_time = threading.Lock()
        self._children: list[subprocess.Popen[bytes]] = []

    def names(self) -> list[str]:
        """Of all runs, newest first."""
        found = [p for p in self.folder.iterdir() if _is_run(p)] if self.folder.is_dir() else []
        return [p.name for p in sorted(found, key=_began, reverse=True)]

    def run(self, name: str) -> Run:
        """A run by its name.

        Raises:
            ApiError: 404; there is none.
        """
        path = self.folder / name
        if not NAME.fullmatch(name) or not _is_run(path):
            raise ApiError(404, f"no run is called '{name[:80]}'")
        return Run(path)

    def rows(self) -> list[dict[str, Any]]:
        """Every run in a line: how it stands, how far it is and what it trains."""
        return [self._row(self.run(name)) for name in self.names()]

    def _row(self, run: Run) -> dict[str, Any]:
        steps = last_records(run.folder.events, ("step",), within=None)
        last = steps[-1] if steps else {}
        return {
            "name": run.path.name,
            **self.told(run),
            "config": self._config(run),
            "step": last.get("step", 0),
            "steps": last.get("steps"),
            "loss": last.get("loss"),
            "started": _began(run.path),
        }

    def told(self, run: Run) -> dict[str, Any]:
        """State and message, paths as a page calls them."""
        self._reap()
        found = run.state()
        return asdict(replace(found, message=found.message and self.roots.worded(found.message)))

    def details(self, name: str) -> dict[str, Any]:
        """All that a page shows of one run besides its events."""
        run = self.run(name)
        adapter = run.folder.adapter
        return {
            **self._row(run),
            "preflight": _read(run.folder.preflight),
            "report": self._report(run),
            "adapter": self.roots.shown(adapter) if adapter.is_dir() else None,
        }

    def _report(self, run: Run) -> Any:
        """report.json, paths as a page calls them."""
        report = _read(run.folder.report)
        paths = {k: self.roots.shown(report[k]) for k in ("run", "adapter") if report.get(k)} if report else {}
        return report and {**report, **paths}

    def _config(self, run: Run) -> dict[str, Any] | None:
        try:
            return shown_config(self.roots, read_config(run.config))
        except UserError:
            return None

    # ------------------------------------------------------------------------------------------ changes

    def begin(self, config: TrainConfig, name: str | None) -> str:
        """Start a training in a process of its own; the run's name.

        Raises:
            ApiError: the name cannot be used or is taken.
            RunError: the folder cannot be written.
        """
        with self._one_at_a_time:
            run = self._new(name)
            atomic.write_text(run.asked, write_yaml(replace(config, output=str(run.path))))
            self._start(run, "train", str(run.asked))
            return run.path.name

    def resume(self, name: str) -> None:
        """Go on with a run that has ended before its end.

        Raises:
            ApiError: it is finished, or still at work.
        """
        with self._one_at_a_time:
            run = self.run(name)
            state = self.told(run)["state"]
            if state == "finished":
                raise ApiError(400, f"'{name}' is finished; start a new run to go on from its adapter")
            if state not in ENDED:
                raise ApiError(400, f"'{name}' is at work already")
            self._start(run, "train", str(run.config), "--output", str(run.path), "--resume")

    def stop(self, name: str) -> None:
        """Ask a training to end its step, write a checkpoint and stop; asked again, it stops at once.

        Raises:
            ApiError: it does not run, or was not started here.
        """
        run = self.run(name)
        noted = process.noted(run.note)
        if noted is None or not noted.alive:
            state = run.state().state
            where = " and was started elsewhere; stop it there" if state == "running" else "; there is nothing to stop"
            raise ApiError(400, f"'{name}' is {state}{where}")
        replace(noted, stopping=True).write(run.note)
        noted.tell(signal.SIGTERM)

    def _start(self, run: Run, *arguments: str) -> None:
        command = [sys.executable, "-m", "twofold", *arguments]
        self._children.append(process.start(command, run.log, run.note))

    def _reap(self) -> None:
        """Children that have ended leave the process table."""
        self._children = [child for child in self._children if child.poll() is None]

    def _new(self, name: str | None) -> Run:
        """A fresh folder, which nobody else has at the same moment."""
        if name is not None and not NAME.fullmatch(name):
            raise ApiError(400, f"'{name[:80]}' cannot name a run; use letters, digits, '.', '_' and '-'")
        taken = set(self.names())
        chosen = name or next(n for n in (f"run-{i}" for i in range(1, len(taken) + 2)) if n not in taken)
        try:
            (self.folder / chosen / "studio").mkdir(parents=True)
        except FileExistsError as error:
            raise ApiError(400, f"a run called '{chosen}' is there already; choose another name") from error
        except OSError as error:
            raise RunError(f"cannot write {self.folder}: {error.strerror}") from error
        return Run(self.folder / chosen)


def _is_run(path: Path) -> bool:
    run = Run(path)
    return bool(NAME.fullmatch(path.name)) and (run.asked.is_file() or run.folder.config.is_file())


def _began(path: Path) -> float:
    run = Run(path)
    return next((f.stat().st_mtime for f in (run.asked, run.folder.config) if f.is_file()), 0.0)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
