"""`twofold serve --engine vllm`: vLLM over the adapter folder, with limits that follow from what lies in it.

vLLM runs in a process of its own, in this environment or in another one with a Python of its own, where Twofold need not be
installed: a folder with this package and its entry point is put on its path.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import twofold
from twofold.base.fingerprint import Fingerprint
from twofold.base.load import locate
from twofold.base.streamed import open_streamed
from twofold.errors import AdapterFileError, BaseError, ConfigError, UserError
from twofold.events import Emit, Message, Warned
from twofold.recipes.serve import ServeConfig, names_of
from twofold.server.checks import checked
from twofold.server.layout import Limits, Source, scan
from twofold.server.security import Policy, digest, plain_origin
from twofold.server.vllm import guard, plugin
from twofold.server.vllm.abilities import Described, EngineLimits, describe, limits_for

ELSEWHERE = (
    "admin_key",
    "cache_memory_mb",
    "deadline_seconds",
    "default_tokens",
    "device",
    "embeddings",
    "max_queued",
    "merge_after",
    "prefix_cache",
    "quantization",
    "weights",
)
"""Settings that vLLM has in its own words, or not at all."""
ENTRY_POINT = "[vllm.general_plugins]\ntwofold = twofold.server.vllm.plugin:register\n"
SECONDS_TO_ANSWER = 10


@dataclass(frozen=True)
class Launch:
    """A vLLM to be started.

    Attributes:
        command: with all its flags.
        environment: what is added to this process's.
        url: where it will listen, seen from this machine.
        token: what shows it that the launcher speaks.
    """

    command: list[str]
    environment: dict[str, str]
    url: str
    token: str


# ---------------------------------------------------------------------------------------------- what is served


def servable(
    sources: Mapping[str, Source], limits: Limits, base: Fingerprint | None, allow_foreign: bool, emit: Emit
) -> dict[str, Described]:
    """The adapters that vLLM can serve, by name; for each of the others a warning says why not."""
    found = {}
    for name, source in sources.items():
        try:
            found[name] = _described(name, source, limits, base, allow_foreign)
        except UserError as error:
            emit(Warned(text=f"vLLM will not serve '{name}': {error}"))
    return found


def _described(name: str, source: Source, limits: Limits, base: Fingerprint | None, allow_foreign: bool) -> Described:
    seen = describe(source.folder)
    if seen.lacking:
        raise AdapterFileError(f"it does not do {', '.join(seen.lacking)}")
    nobody = Fingerprint(shapes="", samples=[])
    checked(source.folder, name, limits, base or nobody, allow_foreign=allow_foreign or base is None)
    return seen


def _fingerprint(reference: str, emit: Emit) -> Fingerprint | None:
    try:
        found = open_streamed(reference).fingerprint()
    except BaseError:
        found = None
    if found is None:
        emit(
            Warned(
                text=f"the weights of {reference} cannot be looked at from here: adapters are not checked against them"
            )
        )
    return found


# ---------------------------------------------------------------------------------------------- how it is started


def plan(config: ServeConfig, state: Path, emit: Emit) -> Launch:
    """The command that serves a base and a folder with vLLM; what it needs beside it is written to `state`.

    Raises:
        UserError: the base or the folder cannot be used, or a flag that means nothing to vLLM was given.
    """
    _check_flags(config)
    root = config.adapters
    if root is None or not root.is_dir():
        raise ConfigError("with --engine vllm give --adapters an adapter folder; for a bare base, start vLLM itself")
    source, base = locate(config.base, emit), _fingerprint(config.base, emit)
    limits = Limits(int(config.max_adapter_mb * 1e6), config.max_rank)
    able = servable(scan(root), limits, base, config.allow_foreign_base, emit)
    chosen = limits_for(able.values(), config.streams, int(config.adapter_memory_mb * 1e6))
    emit(Message(text=f"{len(able)} adapters for vLLM: " + ", ".join(f"{k} {v}" for k, v in chosen._asdict().items())))
    token = secrets.token_hex(16)
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_importable(state)), os.environ.get("PYTHONPATH")))),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # else vLLM asks no resolver
        plugin.ROOT: str(root.resolve()),
        plugin.MEGABYTES: str(config.max_adapter_mb),
        guard.POLICY: guard.as_text(_policy(config), token, int(config.max_body_mb * 1e6)),
    }
    if "VLLM_PLUGINS" in os.environ:  # a list of those that vLLM may load
        environment["VLLM_PLUGINS"] = os.environ["VLLM_PLUGINS"] + ",twofold"
    if base is not None and not config.allow_foreign_base:
        (state / "base.json").write_text(json.dumps(base.as_json()), encoding="utf-8")
        environment[plugin.BASE] = str(state / "base.json")
    here = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    return Launch(_command(config, source, chosen), environment, f"http://{here}:{config.port}", token)


def _check_flags(config: ServeConfig) -> None:
    defaults = {f.name: f.default for f in fields(ServeConfig)}
    given = [name for name in ELSEWHERE if getattr(config, name) != defaults[name] and getattr(config, name) != ()]
    if given:
        flags = ", ".join(("--no-" if defaults[name] is True else "--") + name.replace("_", "-") for name in given)
        raise ConfigError(f"{flags} is for Twofold's own engine; vLLM's settings go into --vllm-flags")
    if not config.port:
        raise ConfigError("vLLM needs a --port above 0")


def _policy(config: ServeConfig) -> Policy:
    hosts = frozenset(h.lower() for h in (*config.allowed_hosts, config.host))
    return Policy(
        hosts=hosts,
        origins=frozenset(map(plain_origin, config.allowed_origins)),
        keys=frozenset(map(digest, config.api_key)),
    )


def _command(config: ServeConfig, source: str, limits: EngineLimits) -> list[str]:
    python = str(config.vllm_python or sys.executable)
    found = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", source]
    found += [
        "--served-model-name",
        *names_of(config.base, config.name),
        "--host",
        config.host,
        "--port",
        str(config.port),
    ]
    found += ["--dtype", config.dtype, "--max-num-seqs", str(config.streams)]
    found += ["--max-model-len", str(config.context)] if config.context else []
    found += ["--enable-lora"]
    for name, value in limits._asdict().items():
        found += ["--" + name.replace("_", "-"), str(value)]
    return [*found, "--middleware", "twofold.server.vllm.guard.Guard", *shlex.split(config.vllm_flags)]


def _importable(state: Path) -> Path:
    """A folder from which vLLM's Python imports this very package and sees its plugin, wherever it is installed itself."""
    folder = state / "path"
    described = folder / f"twofold-{version('twofold')}.dist-info"
    described.mkdir(parents=True)
    (folder / "twofold").symlink_to(Path(twofold.__file__).parent)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: twofold\nVersion: {version('twofold')}\n")
    (described / "entry_points.txt").write_text(ENTRY_POINT)
    return folder


# ---------------------------------------------------------------------------------------------- while it runs


def changed(before: Mapping[str, Source], now: Mapping[str, Source]) -> list[str]:
    """Names that stand for something else than before, or for nothing."""
    return sorted(name for name, source in before.items() if now.get(name) != source)


def unload(launch: Launch, name: str) -> None:
    """Let vLLM ask for a name again when it is next wanted; one that it does not know is let be."""
    body = json.dumps({"lora_name": name}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {launch.token}"}
    request = urllib.request.Request(f"{launch.url}/v1/unload_lora_adapter", body, headers)
    try:
        urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 404:
            raise


def watch(launch: Launch, root: Path, every: float, over: threading.Event, emit: Emit) -> None:
    """Follow the folder until it is over: what has changed there is unloaded, and found anew by the next request."""
    before = scan(root)
    while not over.wait(every):
        now, again = scan(root), {}
        for name in changed(before, now):
            try:
                unload(launch, name)
                emit(Message(text=f"'{name}' has changed: its next request takes the new one"))
            except OSError:  # not up yet, or busy: at the next look
                again[name] = before[name]
        before = now | again


def serve(config: ServeConfig, emit: Emit) -> int:
    """Run vLLM until it ends or is told to; its exit code.

    Raises:
        UserError: as `plan`; or there is no such Python.
    """
    if config.vllm_python is None and find_spec("vllm") is None:
        raise ConfigError(
            "there is no vLLM in this environment; name the Python of one that has it with --vllm-python, or "
            "pip install 'twofold[vllm]'"
        )
    with tempfile.TemporaryDirectory(prefix="twofold-vllm-") as state:
        launch = plan(config, Path(state), emit)
        emit(Message(text=shlex.join(launch.command)))
        try:
            process = subprocess.Popen(launch.command, env=os.environ | launch.environment, stdout=sys.stderr)
        except OSError as error:
            raise ConfigError(f"cannot start {launch.command[0]}: {error.strerror}") from error
        over = threading.Event()
        root = config.adapters
        assert root is not None
        following = threading.Thread(target=watch, args=(launch, root, config.poll_seconds, over, emit), daemon=True)
        with _signals_to(process):
            following.start()
            try:
                return process.wait()
            finally:
                over.set()
                following.join(SECONDS_TO_ANSWER)
                _end(process, config.drain_seconds)


@contextlib.contextmanager
def _signals_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand SIGTERM and SIGINT on to a process."""

    def hand_on(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
