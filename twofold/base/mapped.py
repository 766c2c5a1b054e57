"""A base whose weights are views of its files: for merging from disk to disk, where nothing runs.

transformers builds the model on the meta device, and each parameter becomes the tensor that lies in the files. Those that
transformers joins on loading, the experts of a mixture, would be as large in memory as in the files: they keep their shape alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twofold.base.fingerprint import fingerprint
from twofold.base.head import Head
from twofold.base.load import Base, check_complete, locate, quantization_of, renderer_for
from twofold.base.stored import Places, StoredBase, open_stored, places_in_model
from twofold.errors import BaseError
from twofold.events import Emit, silent


class NotMapped(BaseError):
    """A base whose files do not hold the values of its parameters; the message says why."""

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(f"{reference} cannot be used as its files hold it: {reason}")


def map_base(reference: str, emit: Emit = silent, head: Head | None = None) -> Base:
    """A base in the types that its files have, on the CPU. It cannot run: its buffers have no values, nor have fused parameters.

    Raises:
        NotMapped: it is packed, lacks the head asked for, or is joined or split on loading in a way that only transformers knows.
        BaseError: nothing is found under that reference, or it is no whole safetensors folder.
    """
    from transformers import AutoTokenizer

    source, head = locate(reference, emit), head or Head()
    try:
        stored = open_stored(source)
        model = _without_values(stored, head)
        places = places_in_model(model, stored.shapes, dict(model.named_parameters(remove_duplicate=False)))
        missing = _map(model, stored, places)
    except (ValueError, RuntimeError, NotImplementedError, OSError, BaseError) as error:
        raise NotMapped(reference, str(error).splitlines()[0]) from error
    told = {"missing_keys": missing, "mismatched_keys": [], "unexpected_keys": []}
    if made := head.made(model, told):
        raise NotMapped(reference, f"they lack {', '.join(made)}")
    check_complete(reference, head, told, emit)
    parameters = dict(model.eval().requires_grad_(False).named_parameters())
    known = {n: stored.sampled(places.fused[n], p) if n in places.fused else p for n, p in parameters.items()}
    tokenizer = AutoTokenizer.from_pretrained(stored.folder)
    taken = fingerprint(known, quantization_of(source, model))
    return Base(reference, model, tokenizer, renderer_for(model, tokenizer), taken)


def _without_values(stored: StoredBase, head: Head) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(stored.folder, **head.settings())
    if getattr(config, "quantization_config", None) is not None:
        raise BaseError("their weights are packed")
    with torch.device("meta"):
        model = head.loader().from_config(config, dtype=stored.dtype())
    model.generation_config = _generation(stored) or model.generation_config
    return model


def _generation(stored: StoredBase) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(stored.folder)
    except OSError:
        return None


def _map(model: Any, stored: StoredBase, places: Places) -> set[str]:
    """Put the tensors of the files in place; the parameters that are left without. Ties are transformers' own: of weights that the
    files hold once, or twice with the same values."""
    missing = {n for n, _ in model.named_parameters(remove_duplicate=False)} - set(places.fused)
    for name, key in places.alone.items():
        value = stored.read(key)
        if value.shape != (there := model.get_parameter(name).shape):
            raise BaseError(f"'{key}' has shape {tuple(value.shape)} there, but {tuple(there)} by the config")
        place, _, last = name.rpartition(".")
        model.get_submodule(place)._parameters[last] = nn.Parameter(value, requires_grad=False)
        missing.discard(name)
    for name in places.fused:
        place, _, last = name.rpartition(".")
        model.get_submodule(place)._parameters[last] = _shape_alone(model.get_parameter(name))
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    return missing


def _shape_alone(parameter: Tensor) -> nn.Parameter:
    """A parameter of this shape that takes no memory; whoever computes with it gets NaN."""
    return nn.Parameter(torch.full((1,), torch.nan, dtype=parameter.dtype).expand(parameter.shape), requires_grad=False)
