"""A base without its weights: config to a model on the meta device, whose modules have names and shapes only."""

from __future__ import annotations

from typing import Any

import torch

from twofold.base.load import locate
from twofold.errors import BaseError


def meta_model(reference: str) -> Any:
    """The model of a reference on the meta device; only its configuration is read.

    Raises:
        BaseError: no such base, or its configuration is of no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(locate(reference))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise BaseError(f"cannot read the configuration of {reference}: {str(error).splitlines()[0]}") from error
