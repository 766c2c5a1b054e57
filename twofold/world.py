"""The processes of one training: this one alone, or as many as torchrun started, on one machine or several.

torchrun tells each process its place in the environment. A `World` of one process has no process group, and its methods give
back what they were given, so that the code above has one path. Numbers and small objects travel over gloo, tensors on a
GPU over NCCL.

An error that one process finds is raised in all of them (`together`, `on_main`). A process that dies without a word is
noticed by the others, whose connections to it break, or by torchrun, which then ends them: both become a
`LostProcessError`. Whoever fails first says so, for all (`tells`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from twofold.errors import ConfigError, LostProcessError, TwofoldError

T = TypeVar("T")

BROKEN = re.compile(r"gloo|nccl|ProcessGroup|TCPStore|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
"""What PyTorch's messages name when a process of the group is gone; most of them come as bare RuntimeErrors."""
GONE = (
    "another process of this training ended or was stopped (killed, out of memory, or its machine is gone), so all of them "
    "stop; checkpoints are kept: --resume goes on from the newest, with any number of processes"
)


@dataclass(frozen=True)
class World:
    """The processes that train together, as one of them sees it.

    Attributes:
        rank: which of them this is; rank 0 alone writes.
        size: how many there are.
        local_rank: which it is on its own machine.
        local_size: how many there are on its own machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes for all."""
        return self.rank == 0

    def sum(self, *values: float | int) -> list[float]:
        """Each value summed over all processes, in float64."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return cast(list[float], total.tolist())

    def largest(self, value: int) -> int:
        """The largest value of any process."""
        return max(self.gather(value))

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """A tensor summed over all processes, in place; every process gets the same bits."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def copy_from_main(self, tensor: Tensor) -> None:
        """Overwrite a tensor with rank 0's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; small things only, for they are pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def together(self, work: Callable[[], T]) -> T:
        """Each process works; where one meets an error, all raise it."""
        result, error = _tried(work)
        errors = [e for e in self.gather(error) if e is not None]
        if errors:
            raise error or errors[0]
        return cast(T, result)

    def on_main(self, work: Callable[[], T]) -> T:
        """Rank 0 works, and all have its result, or its error."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [_tried(work) if self.main else None]
        mine = outcome[0]
        dist.broadcast_object_list(outcome, src=0)
        result, error = mine or outcome[0]
        if error is not None:
            raise error
        return cast(T, result)

    def checked_device(self, device: torch.device, name: str) -> torch.device:
        """The device, if every process can have one of its kind for itself.

        Raises:
            ConfigError: the name picks one GPU for several processes, or there are fewer GPUs than processes.
        """
        if self.size == 1 or device.type == "cpu":
            return device
        if ":" in name:
            raise ConfigError(
                f"device '{name}' is one for all {self.size} processes; say '{device.type}' and each has its own"
            )
        count = torch.accelerator.device_count()
        if self.local_size > count:
            raise ConfigError(
                f"{self.local_size} processes share {count} GPUs here; start torchrun --nproc-per-node {count}"
            )
        return device


ALONE = World()


def _tried(work: Callable[[], T]) -> tuple[T | None, TwofoldError | None]:
    try:
        return work(), None
    except TwofoldError as error:
        return None, error


def from_environment() -> World:
    """The place that torchrun gave this process; a world of one where nobody did."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return World(*(int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)))


def started_again() -> bool:
    """Whether torchrun (`--max-restarts`) started the processes anew after one failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined() -> Iterator[World]:
    """Meet the other processes, for the length of a `with` block; a process group that is there already is used.

    Raises:
        LostProcessError: another process is gone.
    """
    world = from_environment()
    if world.size == 1 or dist.is_initialized():
        yield world
        return
    if torch.cuda.is_available() and world.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(world.local_rank)
    try:
        with _ended_by_torchrun(), _named():
            _meet()
            yield world
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _named() -> Iterator[None]:
    """Name what PyTorch calls a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or BROKEN.search(str(error)):
            raise LostProcessError(GONE) from error
        raise


def _meet() -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            world = from_environment()
            dist.init_process_group(backend, store=_torchruns_store(), rank=world.rank, world_size=world.size)
        else:
            dist.init_process_group(backend)
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostProcessError(f"cannot meet the other processes of this training at {where}: {error}") from error


@contextmanager
def _ended_by_torchrun() -> Iterator[None]:
    """torchrun ends all processes when one fails: then say so instead of vanishing, and finish saying it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise LostProcessError(GONE)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tells()  # before the connections close and others fail for that
        raise
    signal.signal(signal.SIGTERM, before)


def _torchruns_store() -> Any:
    """torchrun's store, under a name of this attempt: it outlives restarts, and remembers addresses that are gone."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    whole = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
    return dist.PrefixStore(f"twofold/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", whole)  # type: ignore[attr-defined]


def tells() -> bool:
    """Whether it is for this process to say why the training ends: the first that asks, of all its processes."""
    world = from_environment()
    if world.size == 1:
        return True
    try:
        return int(_torchruns_store().compare_set("teller", "", str(world.rank))) == world.rank
    except (KeyError, RuntimeError):  # nobody keeps count any more
        return True


def tell_torchrun(sentence: str) -> None:
    """Have torchrun show why a process failed, where it sums up."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}))
