"""Whether an adapter may be served, told before a tensor is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from twofold.adapter.config import LoraConfig
from twofold.adapter.files import AdapterFiles, open_adapter
from twofold.base.fingerprint import Fingerprint, check_same_base
from twofold.errors import AdapterFileError, ForeignBaseError
from twofold.server.layout import Limits


def checked(folder: Path, name: str, limits: Limits, fingerprint: Fingerprint, *, allow_foreign: bool) -> AdapterFiles:
    """An adapter that may be served, judged by its configuration and the header of its tensors; no tensor is read.

    Raises:
        UserError: something in it is not supported, too large, for another task or for another base.
    """
    files = open_adapter(folder)
    highest = max(_ranks(files))
    if highest > limits.rank:
        raise AdapterFileError(f"adapter '{name}' has rank {highest}, above the {limits.rank} of this server")
    if files.provenance is None:
        return files
    task = files.provenance.training.get("task", "causal-lm")
    if task != "causal-lm":
        raise AdapterFileError(f"adapter '{name}' was trained for {task} and cannot answer")
    if files.provenance.base is not None and not allow_foreign:
        try:
            check_same_base(files.provenance.base, fingerprint, f"adapter '{name}'")
        except ForeignBaseError as error:
            raise ForeignBaseError(str(error).partition(";")[0]) from error
    return files


def _ranks(files: AdapterFiles) -> Iterator[int]:
    """Ranks by the config and by the shapes of the tensors."""
    config: LoraConfig = files.config
    yield from (config.r, *config.rank_pattern.values())
    for key, shape in files.tensors.shapes.items():
        if key.endswith(("lora_A.weight", "lora_embedding_A")) and shape:
            yield shape[0]
