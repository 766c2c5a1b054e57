"""Inside vLLM: a resolver that finds adapters in the folder all engines share, and the door in front of the server.

vLLM finds `register` through its entry point group `vllm.general_plugins`, in each of its processes, and calls it. It does
something only where TWOFOLD_VLLM_ADAPTERS names a folder. Then a request whose `model` is no adapter that vLLM knows is looked for
there, by the same names as in Twofold's own server: `NAME` is the current generation, `NAME@HASH` that very one.

vLLM asks once for each name and keeps the answer until the name is unloaded; `twofold serve --engine vllm` unloads names whose
folder has changed. It tells requests in one batch apart by the `lora_name` of what is returned here, so that this is the
generation and never the same twice: requests that began before a change keep their weights beside those that began after it.

This module imports nothing heavy: of Twofold the folder's layout alone, and torch, which vLLM has anyway, where there is a base to
compare with.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from twofold.adapter.folder import OURS
from twofold.errors import AdapterFileError, UserError
from twofold.server.layout import GENERATION, NAME, Limits, Source, content_hash, scan, snapshot
from twofold.server.vllm.abilities import RANKS, describe

ROOT, BASE, MEGABYTES = "TWOFOLD_VLLM_ADAPTERS", "TWOFOLD_VLLM_BASE", "TWOFOLD_VLLM_MAX_ADAPTER_MB"
"""Environment variables: the folder; a JSON file with the base's fingerprint, if it is to be checked; the most of one adapter."""
log = logging.getLogger("vllm.twofold")


def register() -> None:
    """Add the resolver to vLLM's, once; vLLM calls this in all of its processes."""
    root = os.environ.get(ROOT)
    if not root:
        return
    if not Path(root).is_dir():
        raise AdapterFileError(f"{ROOT} names {root}, where there is no folder")
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class Resolver(LoRAResolver):  # type: ignore[misc, unused-ignore]
        """vLLM's face of a `Folder`."""

        def __init__(self, folder: Folder) -> None:
            self.folder = folder

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            from vllm.lora.request import LoRARequest

            try:
                found = await asyncio.to_thread(self.folder.find, lora_name)
            except (UserError, OSError) as error:
                log.warning("adapter %s is not served: %s", lora_name, error)
                return None
            if found is None:
                return None
            name, path = found  # vLLM gives the request a number of its own
            return LoRARequest(lora_name=name, lora_int_id=1, lora_path=str(path))

    megabytes = float(os.environ.get(MEGABYTES, "512"))
    limits = Limits(int(megabytes * 1e6), RANKS[-1])
    LoRAResolverRegistry.register_resolver("twofold", Resolver(Folder(Path(root), limits)))


class Folder:
    """Adapters by name, as paths whose content never changes."""

    def __init__(self, root: Path, limits: Limits) -> None:
        self.root, self.limits = root, limits
        self._copies: Path | None = None
        self._given: Counter[str] = Counter()

    def find(self, name: str) -> tuple[str, Path] | None:
        """A name for what answers, which was never given before, and where that lies; None for an unknown name.

        Raises:
            OSError: it cannot be read now.
            UserError: it cannot be read, belongs to another base, or vLLM does not do it.
        """
        if not (NAME.fullmatch(name) or GENERATION.fullmatch(name)):
            return None
        source = scan(self.root).get(name)
        if source is None:
            return None
        digest, path = self._lasting(source)
        check(path, source.name)
        generation = f"{source.name}@{digest}"
        self._given[generation] += 1
        times = self._given[generation]
        return (generation if times == 1 else f"{generation}~{times}"), path

    def _lasting(self, source: Source) -> tuple[str, Path]:
        """An adapter's hash and folder: a generation's own, which is what it promises to be, or a copy of a plain adapter."""
        if source.bytes > self.limits.bytes:
            raise AdapterFileError(f"it has {source.bytes} bytes, more than the {self.limits.bytes} that are allowed")
        if source.digest is not None:
            found = content_hash(source.folder)
            if not found.startswith(source.digest[: len(found)]):
                raise AdapterFileError("its files are not those that its name promises")
            return found, source.folder
        if self._copies is None:
            self._copies = Path(tempfile.mkdtemp(prefix="twofold-vllm-"))
            atexit.register(shutil.rmtree, self._copies, ignore_errors=True)
        copy = Path(tempfile.mkdtemp(dir=self._copies))
        digest = snapshot(source, self.root, copy, self.limits)
        lasting = self._copies / f"{source.name}@{digest}"
        if lasting.exists():
            shutil.rmtree(copy)
        else:
            copy.rename(lasting)
        return digest, lasting


def check(folder: Path, name: str) -> None:
    """Raise AdapterFileError if vLLM does not do what an adapter asks for, ForeignBaseError if it belongs to another base."""
    if lacking := describe(folder).lacking:
        raise AdapterFileError(f"vLLM does not do {', '.join(lacking)}")
    ours, theirs = os.environ.get(BASE), folder / OURS
    if not ours or not theirs.exists():
        return
    from twofold.base.fingerprint import Fingerprint, check_same_base

    recorded = json.loads(theirs.read_text(encoding="utf-8")).get("base")
    if recorded is not None:
        base = Fingerprint(**json.loads(Path(ours).read_text(encoding="utf-8")))
        check_same_base(recorded, base, f"adapter '{name}'")
