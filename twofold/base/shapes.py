"""A base without its weights: config to a model on the meta device, whose modules have names and shapes only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from twofold.base.head import Head
from twofold.base.known_shapes import KNOWN_SHAPES
from twofold.base.load import locate
from twofold.errors import BaseError, did_you_mean
from twofold.events import Emit, silent

HUB_SECONDS = 5.0
"""How long the hub may take to answer at all before it counts as out of reach."""


def meta_model(reference: str, *heads: Head) -> Any:
    """The model of a reference on the meta device; only its configuration is read.

    Args:
        reference: whatever `locate` takes, or the name of a known shape (`known_shapes.py`).
        heads: what it is to predict with, the first that its configuration has a model for; the next token, if none is given.

    Raises:
        BaseError: no such base, or its configuration is of no such model.
    """
    try:
        config = _config(reference)
        for head in heads or (Head(),):
            if type(config) in head.loader()._model_mapping:
                config.update(head.settings())
                with torch.device("meta"):
                    return head.loader().from_config(config)
    except (OSError, ValueError) as error:
        raise BaseError(f"cannot read the configuration of {reference}: {str(error).splitlines()[0]}") from error
    raise BaseError(
        f"{reference} is a {config.model_type} model, and without weights only causal language models are read; what training it "
        "costs is said by twofold train --dry-run"
    )


def usual_head(reference: str, emit: Emit = silent) -> Head:
    """What a base predicts with where nobody says: an answer apart from its prompt if it has an encoder for that, else the next
    token.

    Raises:
        BaseError: no such base, or its configuration cannot be read.
    """
    source, apart = locate(reference, emit), Head(task="seq2seq")
    try:
        config = _config(source)
    except (OSError, ValueError) as error:
        raise BaseError(f"cannot read the configuration of {reference}: {str(error).splitlines()[0]}") from error
    known = getattr(config, "is_encoder_decoder", False) and type(config) in apart.loader()._model_mapping
    return apart if known else Head()


def _config(reference: str) -> Any:
    from transformers import AutoConfig

    if reference in KNOWN_SHAPES:
        return KNOWN_SHAPES[reference].config()
    path = Path(reference).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)  # its header alone, nothing is converted
    source = locate(reference)
    if not Path(source).is_dir():
        _check_reachable(source)
    return AutoConfig.from_pretrained(source)


def _check_reachable(hub_id: str) -> None:
    """Ask the hub once, unless its answer is in the cache: its own client would try again for half a minute."""
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:
        raise BaseError(
            f"the hub cannot be reached, so the configuration of {hub_id} cannot be read; name a folder or, for its shape "
            f"alone, a name of `twofold base list`{did_you_mean(hub_id.rsplit('/', 1)[-1].lower(), KNOWN_SHAPES)}"
        ) from error
