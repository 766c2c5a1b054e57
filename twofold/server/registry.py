"""Adapters by name: found in a folder, loaded on demand, replaced without disturbing anyone, dropped when memory is short.

A name stands for a `Source`, the state of a folder; loading one makes a `Generation`, which never changes and is called by its
content, `NAME@HASH`. A request takes a lease on a generation and keeps it to its end, whatever becomes of the name meanwhile.
What is in memory, and what goes from there, is memory.py's affair.

Everything here runs on the event loop; files are read in threads, and the engine is spoken to through its worker.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from twofold.base.load import Base
from twofold.errors import AdapterFileError, ClashError, UserError, nearest
from twofold.server.checks import checked
from twofold.server.errors import ApiError, without_paths
from twofold.server.layout import NAME, Limits, Source, scan, snapshot, source_at, source_named
from twofold.server.memory import Generation, Memory
from twofold.server.templates import Renderers
from twofold.server.worker import Worker

REST = 20
"""A look at the adapter folder takes at most one part in so many of the time."""
TOO_LARGE = "adapter '{}' is larger than all the memory for adapters; raise --adapter-memory-mb"
log = logging.getLogger("twofold.server")


class _Unwanted(Exception):
    """Nobody waits for a load any more."""


@dataclass(eq=False)
class _Loading:
    """A load on its way, and how many wait for it."""

    task: asyncio.Task[Generation]
    waiters: int = 0
    made: Generation | None = None


@dataclass(frozen=True, kw_only=True)
class RegistryConfig:
    """What the registry may take.

    Attributes:
        root: where adapters lie; None: there are none.
        limits: of one adapter.
        budget_bytes: of all that are in memory.
        allow_foreign: serve adapters that were trained on another base.
    """

    root: Path | None
    limits: Limits
    budget_bytes: int
    allow_foreign: bool = False


class Registry:
    """The adapters of one server.

    Attributes:
        memory: what is loaded.
        loads: adapters read since the start.
        gone: is told each name that is served no longer, and again once its last request has ended.
    """

    def __init__(self, config: RegistryConfig, base: Base, base_names: tuple[str, ...], worker: Worker) -> None:
        self.config, self.base, self.worker = config, base, worker
        self.base_names = base_names
        self.memory = Memory(config.budget_bytes, worker)
        self.memory.dropped = self._dropped
        self.loads = 0
        self.gone: Callable[[str], None] = lambda _: None
        self._renderers = Renderers(base)
        self._found: dict[str, Source] = {}
        self._called: dict[str, Source] = {}  # by the load endpoint, under names of their own
        self._hidden: dict[str, Source | None] = {}  # unloaded, until the folder is another
        self._keys: dict[Source, str] = {}
        self._loading: dict[Source, _Loading] = {}
        self._putting: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by key, while one is read
        self._refused: dict[Source, str] = {}

    # ------------------------------------------------------------------------------------------ names

    def names(self) -> list[str]:
        """The names of all adapters, loaded or not; pinned generations are not listed."""
        known = {**self._found, **self._called}
        return sorted(n for n in known if "@" not in n and self._source(n))

    def adapter_of(self, model: str) -> str | None:
        """The adapter's name in a request's `model`: `NAME`, `NAME@HASH` or `BASE:NAME`; None for the bare base.

        The hash is that of a generation which lies in the folder under this name, or which a plain adapter has in memory.

        Raises:
            ApiError: 404 with the nearest names; a name that is not known never means the base.
        """
        if model in self.base_names:
            return None
        base, colon, name = model.rpartition(":")
        if (not colon or base in self.base_names) and (self._source(name) or self.generation_of(name)):
            return name
        near = nearest(name, [*self.names(), *self.base_names])
        hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "; GET /v1/models lists all"
        raise ApiError(404, f"no model {model[:200]!r} here{hint}", code="model_not_found", param="model")

    def generation_of(self, name: str) -> Generation | None:
        """The generation that a name stands for now, if it is in memory; as NAME@HASH, that of NAME, if it has this hash."""
        source = self._source(name)
        if source:
            return self.memory.loaded.get(self._keys.get(source, ""))
        owner, _, digest = name.partition("@")
        found = self.generation_of(owner) if digest else None
        return found if found and found.digest == digest else None

    def refusal_of(self, name: str) -> str | None:
        """Why an adapter could not be loaded when that was last tried."""
        source = self._source(name)
        return self._refused.get(source) if source else None

    @property
    def loaded(self) -> list[Generation]:
        """What is in memory, least recently used first."""
        return list(self.memory.loaded.values())

    def awaited(self) -> list[str]:
        """Names of the adapters that are being loaded."""
        return sorted(source.name for source in self._loading)

    def _source(self, name: str) -> Source | None:
        found = self._found.get(name)
        return self._called.get(name) or (None if found == self._hidden.get(name) else found)

    # ------------------------------------------------------------------------------------------ leases

    async def acquire(self, name: str) -> Generation:
        """A lease on the current generation of an adapter, which is loaded if need be; `release` gives it back.

        Raises:
            ApiError: the adapter cannot be served, or there is no room for it.
        """
        loaded = self.generation_of(name)
        if loaded is not None:
            loaded.asked.add(name)
            return self.memory.lease(loaded)
        source = self._source(name)
        if source is None:
            raise ApiError(404, f"no adapter {name!r} here any more", code="model_not_found", param="model")
        made = await self._wait_for(self._loading.get(source) or self._begin(source, name))
        made.asked.add(name)
        return made

    def release(self, generation: Generation) -> None:
        """Give a lease back."""
        self.memory.release(generation)

    async def _wait_for(self, loading: _Loading) -> Generation:
        loading.waiters += 1
        try:
            return await asyncio.shield(loading.task)
        except asyncio.CancelledError:
            if loading.made is None:
                loading.waiters -= 1
            else:
                self.release(loading.made)
            raise

    def _begin(self, source: Source, name: str) -> _Loading:
        if source in self._refused:
            raise _refusal(self._refused[source])
        task = asyncio.get_running_loop().create_task(self._load(source, name))
        loading = self._loading[source] = _Loading(task)
        task.add_done_callback(lambda t: t.cancelled() or t.exception())  # heard, even if all who waited have gone
        return loading

    # ------------------------------------------------------------------------------------------ loading

    async def _load(self, source: Source, name: str) -> Generation:
        loading = self._loading[source]
        try:
            made = await self._read(source, name)
        except UserError as error:
            self._refused[source] = str(error)
            log.warning("adapter refused", extra={"fields": {"adapter": name, "reason": str(error)}})
            raise _refusal(str(error)) from error
        except OSError as error:
            log.warning("adapter not read", extra={"fields": {"adapter": name, "reason": str(error)}})
            said = f"adapter '{name}' cannot be read now ({error.strerror}); ask again, or see to the server's disk"
            raise ApiError(503, said, code="adapter_unreadable", param="model", retry_after=1) from error
        finally:
            if self._loading.get(source) is loading:
                del self._loading[source]
        made.leases += loading.waiters
        made.stale = self.generation_of(name) is not made
        loading.made = made
        self.release(made)
        return made

    async def _read(self, source: Source, name: str) -> Generation:
        if source.bytes > self.config.budget_bytes:
            raise AdapterFileError(TOO_LARGE.format(name))
        async with (
            _temporary_folder() as folder,
            self.memory.reserved(source.bytes, lambda: self._check_awaited(source)),
        ):
            try:
                return await self._put(source, name, folder)
            except ClashError as error:
                said = f"adapter '{name}' cannot be beside one that is in use now; ask again when that is idle"
                raise ApiError(503, said, code="adapter_clash", param="model", retry_after=1) from error
            except UserError as error:
                raise AdapterFileError(without_paths(str(error), folder, f"adapter '{name}'")) from error

    async def _put(self, source: Source, name: str, folder: Path) -> Generation:
        """The generation in memory, with a lease on it, so that nobody drops it before those who wait have theirs."""
        config = self.config
        assert config.root is not None
        digest = await asyncio.to_thread(snapshot, source, config.root, folder, config.limits, self.worker.give_way)
        key = self._keys[source] = f"{source.name}@{digest}"
        async with self._putting.setdefault(key, asyncio.Lock()):
            if key not in self.memory.loaded:
                self.memory.loaded[key] = await self._made(source, key, name, folder)
            return self.memory.lease(self.memory.loaded[key])

    async def _made(self, source: Source, key: str, name: str, folder: Path) -> Generation:
        config = self.config
        files = await asyncio.to_thread(
            checked, folder, name, config.limits, self.base.fingerprint, allow_foreign=config.allow_foreign
        )
        renderer = await asyncio.to_thread(self._renderers.of, files.provenance)
        self._check_awaited(source)
        held = await self.memory.read(key, folder)
        if held > config.budget_bytes:
            await self.worker.call(lambda scheduler: scheduler.drop_adapter(key))
            raise AdapterFileError(TOO_LARGE.format(name))
        self.loads += 1
        log.info("adapter loaded", extra={"fields": {"adapter": key, "bytes": held}})
        return Generation(key, held, renderer)

    def _check_awaited(self, source: Source) -> None:
        """Give a load up if nobody waits for it; whoever comes from now on begins anew.

        Raises:
            _Unwanted: so it is.
        """
        if not self._loading[source].waiters:
            del self._loading[source]
            raise _Unwanted

    def _dropped(self, generation: Generation) -> None:
        for name in generation.asked:
            if not self._source(name):
                self.gone(name)

    # ------------------------------------------------------------------------------------------ changes

    async def load(self, name: str, path: str, *, in_place: bool) -> Generation:
        """Serve the adapter at `path`, below the root, as `name`, and load it now.

        A name that stands for the same in the folder goes on following the folder; any other follows what lies at `path`.

        Raises:
            ApiError: the name is taken or cannot be used, nothing lies there, or it cannot be served.
        """
        if not NAME.fullmatch(name) or name in self.base_names:
            raise ApiError(400, f"{name[:200]!r} cannot name an adapter here", code="bad_name", param="lora_name")
        try:
            source = await asyncio.to_thread(source_at, self._root(), path)
        except AdapterFileError as error:
            raise ApiError(404, str(error), code="adapter_not_found", param="lora_path") from error
        follows = source == await asyncio.to_thread(source_named, self._root(), name)
        before = self._source(name)
        if before is not None and before != source and not in_place:
            said = f"the adapter {name!r} is there already; to replace it, set load_inplace to true"
            raise ApiError(400, said, code="already_loaded", param="lora_name")
        called, hidden = self._called.pop(name, None), self._hidden.pop(name, None)
        (self._found if follows else self._called)[name] = source
        try:
            generation = await self.acquire(name)
        except BaseException:
            self._called.pop(name, None)
            self._called |= {name: called} if called else {}
            self._hidden |= {name: hidden} if hidden else {}
            raise
        self.release(generation)
        await self._forget_stale()
        return generation

    def _root(self) -> Path:
        if self.config.root is None:
            raise ApiError(400, "this server has no adapter root; start it with --adapters DIR", code="no_adapters")
        return self.config.root

    async def unload(self, name: str) -> None:
        """Serve a name no longer, until it is loaded again or its folder changes; its memory is freed with its last request.

        Raises:
            ApiError: 404 for an unknown name.
        """
        if name not in self.names():
            near = nearest(name, self.names())
            hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
            raise ApiError(404, f"no adapter {name[:200]!r} here{hint}", code="model_not_found", param="lora_name")
        self._called.pop(name, None)
        self._hidden |= {n: s for n, s in self._found.items() if n.partition("@")[0] == name}
        self.gone(name)
        await self._forget_stale()

    async def refresh(self) -> None:
        """Look at the folder once."""
        if self.config.root is None:
            return
        found = await asyncio.to_thread(scan, self.config.root)
        found = {n: s for n, s in found.items() if n not in self.base_names}
        before = dict(self._called)
        seen = await asyncio.to_thread(lambda: {n: self._seen_again(s) for n, s in before.items()})
        moved = {n: s for n, s in seen.items() if s != before[n] and self._called.get(n) == before[n]}
        if moved or found != self._found:
            vanished = self._found.keys() - found.keys() - self._called.keys()
            self._found = found
            self._called |= moved
            for name in vanished:
                self.gone(name)
            await self._forget_stale()

    def _seen_again(self, source: Source) -> Source:
        """The source as its folder is now; as it was, if the folder has gone."""
        try:
            return source_at(self._root(), str(source.folder))
        except AdapterFileError:
            return source

    async def watch(self, seconds: float) -> None:
        """Look at the folder again and again; less often where a look takes long."""
        taken = 0.0
        while True:
            await asyncio.sleep(max(seconds, REST * taken))
            begun = time.monotonic()
            try:
                await self.refresh()
            except Exception:
                log.exception("the adapter folder could not be watched")
            taken = time.monotonic() - begun

    async def _forget_stale(self) -> None:
        """Drop what no name stands for any more: now, or with its last lease."""
        served = {s for n in (*self._found, *self._called) if (s := self._source(n))}
        self._keys = {s: k for s, k in self._keys.items() if s in served or s in self._loading}
        self._refused = {s: r for s, r in self._refused.items() if s in served}
        live = set(self._keys.values())
        for generation in self.loaded:
            generation.stale = generation.key not in live
            if generation.stale:
                await self.memory.tidy(generation)


@asynccontextmanager
async def _temporary_folder() -> AsyncIterator[Path]:
    """Made and removed off the event loop: either takes its time where the disk is busy."""
    folder = await asyncio.to_thread(tempfile.mkdtemp, prefix="twofold-")
    try:
        yield Path(folder)
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _refusal(reason: str) -> ApiError:
    return ApiError(400, reason, code="adapter_refused", param="model")
