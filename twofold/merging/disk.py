"""A merge from disk to disk: the base's files over again, with the values of those tensors that adapters change.

Nothing is held but the tensor at hand. The base in memory is a view of the same files (`base/mapped.py`); a layer forms its
merged tensors (`folded`) when the file comes to them, and all other bytes are copied. So every kind of layer is merged by its own
rule, and header, order and metadata of a file are the base's. Experts that lie apart in the files are merged apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from twofold import atomic
from twofold.base.stored import INDEX, Piece, StoredBase, copy_others, places_in_model
from twofold.errors import ConfigError
from twofold.events import Emit, Progress, silent
from twofold.layers.experts import LoraParameters
from twofold.layers.linear import LoraLinear
from twofold.layers.protocol import AdapterLayer
from twofold.layers.weights import WeightsLayer
from twofold.lowrank.factors import LowRank, folded
from twofold.machine import one_thread_a_product
from twofold.merging.checkpoint import check_mergeable

Found = TypeVar("Found")
WRITTEN_AT_ONCE = 1 << 17
PLAIN = (int, float, str, tuple, dict)
"""What a share may say of itself besides its tensors."""


class NotStreamed(ConfigError):
    """A merge that only the model in memory can make; the message says why."""


class Change(NamedTuple):
    """What changes a tensor of the files: a layer, by the tensor's name in it, or by that of the parameter it is a piece of."""

    layer: AdapterLayer
    name: str
    piece: Piece | None = None


class Formed:
    """The tensors of the layer at hand, which may have several of them, and memory for those that are formed one at a time.

    Args:
        narrowest: of the types that a sum is rounded to; the stored tensor's own, if that is wider or there is none.
    """

    def __init__(self, narrowest: torch.dtype | None = None) -> None:
        self._narrowest = narrowest
        self._last: tuple[AdapterLayer, dict[str, Tensor]] | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, layer: AdapterLayer, name: str, stored: Tensor) -> Tensor:
        """One tensor of a layer, merged; what is in the files if the layer leaves it as it is."""
        if type(layer) is LoraLinear and name == "weight":
            return layer.fold(self.memory(stored))
        if type(layer) is LoraLinear:
            return stored if (bias := layer.folded_bias()) is None else bias
        if self._last is None or self._last[0] is not layer:
            self._last = None  # the one before goes first
            self._last = (layer, layer.folded())
        return self._last[1].get(name, stored)

    def type_for(self, stored: Tensor) -> torch.dtype:
        """What a merged tensor is given in."""
        return stored.dtype if self._narrowest is None else torch.promote_types(stored.dtype, self._narrowest)

    def memory(self, like: Tensor) -> Tensor:
        """Memory for a merged tensor, the same each time: it is over with the one before."""
        dtype = self.type_for(like)
        size = like.numel() * dtype.itemsize
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size].view(dtype).view(like.shape)


@dataclass
class Replay:
    """What the merged folder holds, tensor by tensor.

    Attributes:
        base: the files.
        changed: by checkpoint key, what may change the tensor.
        untied: whether an update lands on one of two tied weights, so that both are written.
        added: keys of such weights that the base's files have no tensor of, with the key whose base values they keep
            if no adapter changes them.
    """

    base: StoredBase
    changed: dict[str, Change]
    untied: bool = False
    added: dict[str, str] = field(default_factory=dict)

    def tensor(self, key: str, formed: Formed) -> Tensor:
        """The merged value of one tensor."""
        stored = self.base.read(self.added.get(key, key))
        if key not in self.changed:
            return stored
        layer, name, piece = self.changed[key]
        if piece is not None and isinstance(layer, LoraParameters):
            update = layer.update(name, piece.expert)
            part = LowRank(update.A, update.B[piece.rows], update.scale)
            return folded(stored, part, into=formed.memory(stored))
        return formed.of(layer, name, stored).detach().to("cpu", formed.type_for(stored)).contiguous()

    def in_shard(self, shard: str) -> list[str]:
        """Its keys in the order of the merged file: the base's, then those that are added."""
        file = self.base.shards[shard]
        return [*file.in_order(), *(key for key, twin in self.added.items() if twin in file.shapes)]

    def tensors(self, shard: str, narrowest: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of one file; sums of linear layers and experts are rounded to no narrower type than this, if it is given."""
        formed = Formed(narrowest)
        for key in self.in_shard(shard):
            yield key, self.tensor(key, formed)


@torch.no_grad()
def plan_replay(model: Any, base: StoredBase) -> Replay:
    """How the active adapters of a live model change the files of its base.

    Args:
        model: in the types of the files; mapped from them (`map_base`), nothing of it is held.

    Raises:
        NotStreamed: the model is in another type than the files, or a changed tensor is joined or split on loading.
        ConfigError: no adapter is active, the base is packed, or a bias of B has no bias of the base to go into.
    """
    check_mergeable(model)
    parameters, by_name = _bare(model)
    places = places_in_model(model, base.shapes, parameters)
    twins = {id(parameters[name]): key for name, key in places.alone.items()}
    replay = Replay(base, {})
    for name, change in by_name.items():
        key = places.alone.get(name, name if id(parameters[name]) in twins else None)
        found = _changes(key, change, places.fused.get(name, []))
        for stored in (base.read(k) for k in found if k in base.where):
            if stored.dtype is not parameters[name].dtype:
                raise NotStreamed(f"'{name}' is loaded in {parameters[name].dtype}, but stored in {stored.dtype}")
        if not found:
            raise NotStreamed(f"'{name}' has no tensor of its own in the base's files: it is fused or split on loading")
        replay.changed |= found
        if isinstance(change.layer, LoraLinear):
            change.layer.folded_bias()
    _plan_ties(model, replay, parameters, places.alone, by_name)
    return replay


def _changes(key: str | None, change: Change, pieces: list[Piece]) -> dict[str, Change]:
    """By checkpoint key; empty if no tensor of the files can hold the change."""
    if key is not None:
        return {key: change}
    return {p.key: change._replace(piece=p) for p in pieces if isinstance(change.layer, LoraParameters)}


def _bare(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Change]]:
    """All tensors of the base by their bare names, tied ones by each of theirs; and those of adapted layers."""
    found: dict[str, Tensor] = {}
    changed: dict[str, Change] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdapterLayer):
            held = module.base.state_dict(keep_vars=True)
            found |= {f"{name}.{key}": tensor for key, tensor in held.items()}
            changed |= {f"{name}.{key}": Change(module, key) for key in _touched(module, held)}
    inside = tuple(f"{name}." for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, AdapterLayer))
    own = model.state_dict(keep_vars=True).items()
    return found | {n: p for n, p in own if not n.startswith(inside or ("\0",))}, changed


def _touched(layer: AdapterLayer, held: Iterable[str]) -> Iterable[str]:
    """Which of its base's tensors a layer may change."""
    if not layer.active():
        return ()
    return layer.changed() if isinstance(layer, WeightsLayer) else held


def _plan_ties(
    model: Any,
    replay: Replay,
    parameters: dict[str, Tensor],
    keys: dict[str, str],
    by_name: dict[str, Change],
) -> None:
    """Where tied weights come apart, both are written."""
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        if len(names) < 2 or not any(name in by_name for name in names):
            continue
        stored = next((keys[name] for name in names if name in keys), None)
        if stored is None:
            raise NotStreamed(f"tied weights {', '.join(names)} have no tensor in the base's files")
        apart = [name for name in names if name not in keys]
        if len({by_name.get(name) for name in names}) > 1:
            replay.added |= dict.fromkeys(apart, stored)
            values = [replay.tensor(keys.get(name, name), Formed()) for name in names]
            if not all(torch.equal(values[0], value) for value in values[1:]):
                _check_separable(model, names, apart, parameters)
                replay.untied = True
                continue
        for name in apart:  # the one in the files says it for all
            replay.added.pop(name, None)
            replay.changed.pop(name, None)


def _check_separable(model: Any, names: list[str], apart: list[str], parameters: dict[str, Tensor]) -> None:
    same = places_in_model(model, {name: tuple(parameters[name].shape) for name in apart}, parameters).alone
    if not getattr(model.config, "tie_word_embeddings", False) or any(same.get(name) != name for name in apart):
        raise NotStreamed(
            f"{', '.join(names)} are one weight by the model's making, and cannot come apart in its files"
        )


# ---------------------------------------------------------------------------------------------- writing


def write_replay(replay: Replay, output: Path, *, chat_template: str | None = None, emit: Emit = silent) -> Path:
    """Write the merged folder; killed at any moment, it goes on from the files that are whole.

    Args:
        chat_template: in place of the base's, whose file otherwise stays as it is.

    Raises:
        RunError: the output exists or cannot be written.
    """
    with atomic.resumed_folder(output, _job(replay)) as folder:
        for _ in _over_shards(replay, partial(_write_once, replay, folder), f"merging into {output}", emit):
            pass
        _write_others(replay, folder)
        if chat_template is not None:
            atomic.write_text(folder / "chat_template.jinja", chat_template)
    return output


def _over_shards(replay: Replay, work: Callable[[str], Found], task: str, emit: Emit) -> Iterator[Found]:
    """Two files at a time: while one waits for the disk, the other is summed."""
    shards = list(replay.base.shards)
    with one_thread_a_product(), ThreadPoolExecutor(2) as pool:
        for done, found in enumerate(pool.map(torch.no_grad()(work), shards)):
            emit(Progress(task=task, done=done + 1, total=len(shards)))
            yield found


def _write_once(replay: Replay, folder: Path, shard: str) -> None:
    if not (folder / shard).exists():
        with atomic.new_file(folder / shard) as temporary:
            _write_shard(replay, shard, temporary)


def _write_shard(replay: Replay, shard: str, path: Path) -> None:
    header = _header(replay, shard)
    values = sum(replay.base.read(replay.added.get(key, key)).nbytes for key in replay.in_shard(shard))
    with path.open("wb") as file:
        if sys.platform == "linux":
            os.posix_fallocate(
                file.fileno(), 0, len(header) + values
            )  # faster to write into, and a full disk is told at once
        file.write(header)
        for _, tensor in replay.tensors(shard):
            whole = _bytes(tensor).numpy().data
            for start in range(0, len(whole), WRITTEN_AT_ONCE):
                file.write(whole[start : start + WRITTEN_AT_ONCE])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _header(replay: Replay, shard: str) -> bytes:
    """The base's own, or with entries behind it for tensors that are added."""
    file = replay.base.shards[shard]
    added = replay.in_shard(shard)[len(file.shapes) :]
    if not added:
        return file.header
    entries = json.loads(file.header[8:])
    end = max(e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__")
    for key in added:
        twin = entries[replay.added[key]]
        size = twin["data_offsets"][1] - twin["data_offsets"][0]
        entries[key] = {**twin, "data_offsets": [end, end := end + size]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_others(replay: Replay, folder: Path) -> None:
    shards = {folder / name for name in replay.base.shards}
    for path in set(folder.rglob("*")) - shards:
        if not path.is_dir():
            path.unlink()  # of an earlier start: the base may have lost it since
    copy_others(replay.base.folder, folder)
    if replay.base.index is not None:
        shutil.copyfile(replay.base.folder / INDEX, folder / INDEX)
        if replay.added:
            _write_plain(folder / INDEX, _index(replay, replay.base.index))
    if replay.untied:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _write_plain(folder / "config.json", {**config, "tie_word_embeddings": False})


def _index(replay: Replay, index: dict[str, Any]) -> dict[str, Any]:
    where = {key: index["weight_map"][twin] for key, twin in replay.added.items()}
    twins = [replay.base.read(twin) for twin in replay.added.values()]
    more = {"total_size": sum(t.nbytes for t in twins), "total_parameters": sum(t.numel() for t in twins)}
    metadata = dict(index.get("metadata") or {})
    metadata |= {key: metadata[key] + value for key, value in more.items() if key in metadata}
    return {**index, "metadata": metadata, "weight_map": {**index["weight_map"], **where}}


def _write_plain(path: Path, value: dict[str, Any]) -> None:
    atomic.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _job(replay: Replay) -> str:
    """A digest of the base's files, by size and time, and of all that changes them, by value."""
    digest = hashlib.sha256()
    for name, file in replay.base.shards.items():
        told = file.path.stat()
        digest.update(f"{file.path.resolve()} {name} {told.st_size} {told.st_mtime_ns}\n".encode())
    for key, change in sorted(replay.changed.items(), key=lambda item: item[0]):
        digest.update(f"{key} {change.name} {sorted(replay.added)}\n".encode())
    for layer in dict.fromkeys(change.layer for change in replay.changed.values()):
        for share in layer.active():
            plain = {k: v for k, v in vars(share).items() if k[0] != "_" and isinstance(v, PLAIN)}
            digest.update(f"{type(share).__name__} {share.weight_when_active!r} {plain}\n".encode())
            for tensor in (*share.parameters(), *share.buffers()):
                if tensor.is_meta:
                    continue  # a buffer of the mapped base, which no file holds
                digest.update(_bytes(tensor.detach().cpu()).numpy().tobytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------- checking


def differing(replay: Replay, folder: StoredBase, emit: Emit = silent) -> dict[str, str]:
    """The tensors of a folder that are not, bit for bit, those of the merge, and what is wrong with each."""
    found: dict[str, str | None] = {}
    for some in _over_shards(replay, partial(_compared, replay, folder), f"comparing {folder.folder}", emit):
        found |= some
    wrong = {key: said for key, said in found.items() if said}
    return wrong | dict.fromkeys(sorted(folder.where.keys() - found.keys()), "not in the base")


def _compared(replay: Replay, folder: StoredBase, shard: str) -> dict[str, str | None]:
    there = folder.where
    return {k: _difference(folder.read(k) if k in there else None, tensor) for k, tensor in replay.tensors(shard)}


ROUNDING = "rounded the other way"
"""No value is further off than its neighbour: another machine, or another library, summed in another order."""


def _difference(found: Tensor | None, expected: Tensor) -> str | None:
    if found is None:
        return "missing"
    if found.dtype is not expected.dtype or found.shape != expected.shape:
        return f"{tuple(found.shape)} of {found.dtype}, not {tuple(expected.shape)} of {expected.dtype}"
    if torch.equal(_bytes(found), _bytes(expected)):
        return None
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(found.dtype.itemsize)
    if whole is None or not found.is_floating_point():
        return "other values"
    pairs = zip(*(t.contiguous().flatten().view(whole).split(1 << 20) for t in (found, expected)), strict=True)
    near = all(int((a.long() - b.long()).abs().max()) <= 1 for a, b in pairs)
    return ROUNDING if near else "other values"
