"""A base's parameters by their names in the model, read from its files one at a time; no weights are held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from twofold.base.fingerprint import Fingerprint, Sampled, fingerprint
from twofold.base.head import Head
from twofold.base.load import ORIGIN
from twofold.base.shapes import meta_model
from twofold.base.stored import Piece, StoredBase, open_stored, places_in_model
from twofold.errors import BaseError, did_you_mean


@dataclass(frozen=True)
class StreamedBase:
    """A base on disk.

    Attributes:
        reference: what the user called it.
        model: it without weights, on the meta device.
        stored: its files.
        keys: the checkpoint's key of each parameter that lies there as the model has it.
        fused: the pieces of each that lies there in several tensors, as experts do.
        made: the parameters that the files lack and that start at random: a classification head's.
    """

    reference: str
    model: Any
    stored: StoredBase
    keys: dict[str, str]
    fused: dict[str, list[Piece]]
    made: tuple[str, ...] = ()

    def read(self, name: str) -> Tensor:
        """One parameter, as a view of its file.

        Raises:
            BaseError: it does not lie in the files as such.
        """
        if name in self.made:
            raise BaseError(f"{self.reference} holds no '{name}', which starts at random in every training")
        if name not in self.keys:
            raise BaseError(
                f"{self.reference} holds no '{name}' as the model has it{did_you_mean(name, self.keys)}; is this the right base?"
            )
        return self.stored.read(self.keys[name])

    @property
    def held(self) -> set[str]:
        """The parameters whose values are in the files, as they are or in pieces."""
        return {*self.keys, *self.fused}

    def matrices(self, name: str) -> Iterator[Tensor]:
        """One parameter that is held; one of three dimensions matrix by matrix, wherever these lie."""
        if name in self.fused:
            pieces = sorted(self.fused[name], key=lambda p: (p.expert, p.rows.start))
            for _, of_expert in groupby(pieces, key=lambda p: p.expert):
                yield torch.cat([self.stored.read(p.key) for p in of_expert])
        else:
            whole = self.read(name)
            yield from whole if whole.dim() == 3 else [whole]

    def expect(self, name: str) -> None:
        """Say that a parameter is read next, so that it comes while something else is computed."""
        if name in self.keys:
            self.stored.expect(self.keys[name])

    def fingerprint(self) -> Fingerprint | None:
        """As `load_base` takes it; None where some parameters lie in the files in a form that only transformers knows."""
        parameters = {name: p for name, p in self.model.named_parameters() if name not in self.made}
        if any(name not in self.keys and name not in self.fused for name in parameters):
            return None
        origin = self.stored.folder / ORIGIN
        quantization = json.loads(origin.read_text())["quantization"] if origin.is_file() else None
        return fingerprint({name: self._known(name, p) for name, p in parameters.items()}, quantization)

    def _known(self, name: str, parameter: Tensor) -> Tensor | Sampled:
        return self.stored.sampled(self.fused[name], parameter) if name in self.fused else self.read(name)


def open_streamed(reference: str, head: Head | None = None) -> StreamedBase:
    """The files behind a reference, with names as its model has them.

    Args:
        head: what adapters of it were trained to predict with; a base without such a model may be a sequence-to-sequence one.

    Raises:
        BaseError: no such base, or it is not stored as safetensors.
    """
    head = head or Head()
    stored, model = open_stored(reference), meta_model(reference, head, Head(task="seq2seq"))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = places_in_model(model, stored.shapes, parameters)
    owners = {id(parameters[name]): key for name, key in places.alone.items()}
    tied = {name: owners[id(p)] for name, p in parameters.items() if name not in places.alone and id(p) in owners}
    keys = places.alone | tied
    made = head.made(model, {"missing_keys": parameters.keys() - keys.keys() - places.fused.keys()})
    return StreamedBase(reference, model, stored, keys, places.fused, tuple(made))
