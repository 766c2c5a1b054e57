"""Command lines as processes of their own, without each paying for Python's imports.

A warm interpreter imports everything once and forks a process for every command: one that can be killed, limited in
what it may write, and whose code, stdout and stderr are its own. `tests/cli` and `tests/recipes/test_resume.py` also run
`python -m twofold` itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore


@dataclass(frozen=True)
class Finished:
    """How a process ended: its code (negative: the signal that killed it) and what it said."""

    code: int
    stdout: str
    stderr: str

    def refusal(self) -> str:
        """The one sentence of a command that the user must mend: the last line, after nothing but progress."""
        lines = self.stderr.splitlines()
        assert self.code == 2, self
        assert lines[-1].startswith("twofold: "), self.stderr
        assert all(line.startswith("  ") for line in lines[:-1]), self.stderr
        assert self.stdout == ""
        return lines[-1]

    def json(self) -> Any:
        """The one JSON document on stdout."""
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)


class WarmCli:
    """Runs one command at a time, in one process or in several."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *arguments: object, setup: str = "", cwd: Path | None = None) -> int:
        """Begin a command; its process id. `setup` is Python that runs in it first."""
        self._say([self._command(0, arguments, setup, cwd)])
        return self._heard()

    def wait(self, rank: int = 0) -> Finished:
        """The end of the command that was started."""
        code = self._heard()
        return Finished(code, self._file("stdout", rank).read_text(), self._file("stderr", rank).read_text())

    def __call__(self, *arguments: object, setup: str = "", cwd: Path | None = None) -> Finished:
        self.start(*arguments, setup=setup, cwd=cwd)
        return self.wait()

    def world(self, size: int, *arguments: object, setup: str = "") -> list[Finished]:
        """The command in so many processes, each finding what torchrun would give it, its place and a store; by rank."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        places = [{k: str(v) for k, v in {**shared, "RANK": r, "LOCAL_RANK": r}.items()} for r in range(size)]
        place = "import os; os.environ.update({})\n"
        self._say([self._command(r, arguments, place.format(p) + setup, None) for r, p in enumerate(places)])
        for _ in places:
            self._heard()
        return [self.wait(rank) for rank in range(size)]

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def _file(self, name: str, rank: int) -> Path:
        return self.folder / f"{name}-{rank}"

    def _command(self, rank: int, arguments: Sequence[object], setup: str, cwd: Path | None) -> dict[str, Any]:
        said = {name: str(self._file(name, rank)) for name in ("stdout", "stderr")}
        return {"argv": [str(a) for a in arguments], "setup": setup, "cwd": str(cwd or Path.cwd()), **said}

    def _say(self, commands: list[dict[str, Any]]) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(commands) + "\n")
        self._server.stdin.flush()

    def _heard(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


def torchrun(size: int, *arguments: object, **environment: str) -> Finished:
    """`torchrun --standalone --nproc-per-node SIZE ...` as a shell would run it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size]
    found = subprocess.run(
        list(map(str, [*launcher, *arguments])),
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    return Finished(found.returncode, found.stdout, found.stderr)


def cold(*arguments: object, **environment: str) -> Finished:
    """`python -m twofold` as a shell would run it."""
    found = subprocess.run(
        [sys.executable, "-m", "twofold", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    return Finished(found.returncode, found.stdout, found.stderr)


# ---------------------------------------------------------------------------------------------- the warm interpreter


def _serve() -> None:
    from twofold.cli.main import quiet_libraries

    quiet_libraries()
    import datasets  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    import twofold.cli.train_verb  # noqa: F401

    for line in sys.stdin:
        started = [_forked(command) for command in json.loads(line)]
        for pid in started:
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _forked(command: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        _become(command)
    print(pid, flush=True)
    return pid


def _become(command: dict[str, Any]) -> None:
    from twofold.cli.main import main

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(command["cwd"])
    exec(command["setup"], {})
    try:
        code: Any = main(command["argv"])
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    _serve()
