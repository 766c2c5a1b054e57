"""Models without a description: through their own forward and cache, streams that decode joined into one batch.

A prompt is read by itself. Then its keys and values are laid beside those of the streams that decode already, filled up on the left
to one length, and from there all take their steps together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from twofold.adapter.attach import activate, active, check_weights, detach, shares
from twofold.adapter.files import load_adapter
from twofold.adapter.rows import rows
from twofold.engine.cache import Slots
from twofold.engine.resident import Resident
from twofold.engine.step import Part, Worn
from twofold.errors import AdapterFileError, ConfigError
from twofold.events import Pieces


@dataclass
class _Joined:
    """Streams side by side: their slots (none where one has ended), their cache, and which of its places are filled."""

    slots: list[int | None]
    past: Any
    mask: Int[Tensor, "streams length"]

    def drop_ended(self) -> None:
        """Forget the streams that have ended, and the places that they alone had filled."""
        kept = [i for i, slot in enumerate(self.slots) if slot is not None]
        if len(kept) < len(self.slots):
            at = torch.tensor(kept, device=self.mask.device)
            self.past.batch_select_indices(at)
            first = int(self.mask[at].any(0).int().argmax())
            for layer in self.past.layers:
                layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
            self.mask, self.slots = self.mask[at, first:], [self.slots[i] for i in kept]


class _Caches(Slots):
    """The caches of the streams: of each by itself while its prompt is read, then of those that decode together."""

    def __init__(self, count: int, capacity: int) -> None:
        super().__init__(count, capacity, reuse=False)
        self.reading: dict[int, _Joined] = {}
        self.joined: list[_Joined] = []

    def give_back(self, slot: int) -> None:
        super().give_back(slot)
        self.reading.pop(slot, None)
        for batch in self.joined:
            batch.slots = [None if s == slot else s for s in batch.slots]
        self.joined = [batch for batch in self.joined if any(s is not None for s in batch.slots)]

    def join(self, slot: int) -> None:
        """Let a stream whose prompt is read take its steps with the others; a cache of another kind stays by itself."""
        one = self.reading.pop(slot)
        for batch in self.joined:
            if _can_be_filled_up(batch.past) and _can_be_filled_up(one.past):
                length = max(batch.mask.shape[1], one.mask.shape[1])
                for layer, other in zip(batch.past.layers, one.past.layers, strict=True):
                    layer.keys = torch.cat([_filled_up(layer.keys, length), _filled_up(other.keys, length)])
                    layer.values = torch.cat([_filled_up(layer.values, length), _filled_up(other.values, length)])
                masks = [F.pad(m, (length - m.shape[1], 0)) for m in (batch.mask, one.mask)]
                batch.mask, batch.slots = torch.cat(masks), batch.slots + one.slots
                return
        self.joined.append(one)


class PlainForward:
    """Any causal language model of transformers; adapters are attached to it and worn row by row."""

    def __init__(self, model: Any, streams: int, capacity: int, why: str) -> None:
        self.model = model
        self.path = f"the model's own forward: {why}"
        self.slots = _Caches(streams, capacity)
        self._alive = active(model)

    @property
    def merged(self) -> tuple[str, ...]:
        return ()

    def reading(self, key: str, folder: Path) -> Pieces[Resident]:
        yield
        name = key.replace(".", "@@")  # modules are called by it, and have no dots in their names
        load_adapter(self.model, folder, name)
        activate(self.model, self._alive or None)
        yield
        self._check_by_rows(name, folder)
        return Resident(name, {})

    @torch.inference_mode()
    def _check_by_rows(self, key: str, folder: Path) -> None:
        """Run two rows, one of them with the adapter; one that no row can have for itself is taken off the model."""
        tokens = torch.arange(6, device=self.model.device).view(2, 3) % self.model.get_input_embeddings().num_embeddings
        try:
            with rows(self.model, [self._alive | {key: 1.0}, self._alive]):
                self.model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        except ConfigError as error:
            detach(self.model, key)
            said = str(error).partition(";")[0]
            raise AdapterFileError(
                f"the adapter at {folder} cannot be that of some rows of a batch alone: {said}; merge it into a base of its own "
                "(twofold merge) and serve that"
            ) from error

    def check(self, worn: Worn) -> None:
        if worn:
            check_weights(self.model, self._worn_by_name(worn))

    def bytes_of(self, resident: Resident) -> int:
        held = shares(self.model, resident.key).values()
        return sum(t.nbytes for share in held for t in (*share.parameters(), *share.buffers()))

    def drop(self, resident: Resident) -> None:
        detach(self.model, resident.key)

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> Float[Tensor, "asked vocabulary"]:
        for batch in self.slots.joined:
            batch.drop_ended()
        decoding = {slot for batch in self.slots.joined for slot in batch.slots}
        found = self._decode([p for p in parts if p.slot in decoding])
        read = [p for p in parts if p.slot not in decoding]
        found |= {p.slot: self._read(p) for p in read}
        for part in parts:
            self.slots.extend(part.slot, part.tokens)
        for part in (p for p in read if p.asked):
            self.slots.join(part.slot)
        return torch.stack([found[p.slot] for p in parts if p.asked]) if any(p.asked for p in parts) else torch.empty(0)

    def _read(self, part: Part) -> Float[Tensor, " vocabulary"]:
        """The next tokens of a prompt, by themselves."""
        if part.start == 0:
            nothing = torch.empty(1, 0, dtype=torch.long, device=self.model.device)
            self.slots.reading[part.slot] = _Joined([part.slot], DynamicCache(), nothing)
        logits: Tensor = self._forward(self.slots.reading[part.slot], [part])[0]
        return logits

    def _decode(self, parts: Sequence[Part]) -> dict[int, Tensor]:
        """The next logits of streams that decode, by slot."""
        by_slot = {p.slot: p for p in parts}
        found: dict[int, Tensor] = {}
        for batch in self.slots.joined:
            some = [by_slot[slot] for slot in batch.slots if slot is not None]
            found |= dict(zip([p.slot for p in some], self._forward(batch, some), strict=True))
        return found

    def _forward(self, batch: _Joined, parts: Sequence[Part]) -> Float[Tensor, "streams vocabulary"]:
        new = torch.tensor([list(p.tokens) for p in parts], device=batch.mask.device)
        batch.mask = torch.cat([batch.mask, torch.ones_like(new)], 1)
        positions = (batch.mask.cumsum(-1) - 1)[:, -new.shape[1] :]
        with self._worn(parts):
            out = self.model(
                input_ids=new,
                attention_mask=batch.mask,
                position_ids=positions,
                past_key_values=batch.past,
                use_cache=True,
                logits_to_keep=1,
            )
        batch.past = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits

    def _worn(self, parts: Sequence[Part]) -> AbstractContextManager[None]:
        """Each row with the adapters of its stream beside those that are active on the model."""
        if not any(p.worn for p in parts):
            return nullcontext()
        return rows(self.model, [self._worn_by_name(p.worn) for p in parts])

    def _worn_by_name(self, worn: Worn) -> dict[str, float]:
        return self._alive | {resident.key: weight for resident, weight in worn}


def _can_be_filled_up(past: Any) -> bool:
    return isinstance(past, DynamicCache) and all(type(layer) is DynamicLayer for layer in past.layers)


def _filled_up(x: Float[Tensor, "streams heads length d"], length: int) -> Tensor:
    return F.pad(x, (0, 0, length - x.shape[2], 0))
