"""A merged model whose linear weights are packed again, as a folder that transformers reads with bitsandbytes' own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twofold.errors import ConfigError
from twofold.layers.quantised import QuantisedLinear
from twofold.merging.checkpoint import merged_state, write_state
from twofold.quant import NF4Weight, Scheme, quantise


@torch.no_grad()
def write_requantised(
    model: Any, tokenizer: Any, output: Path, packed: nn.Module, scheme: Scheme, *, chat_template: str | None = None
) -> Path:
    """Write a 16-bit model with its active adapters folded in and then packed.

    Args:
        model: in 16 bits, with adapters.
        packed: the same base, packed: its packed modules say which.

    Raises:
        ConfigError: another format than NF4 is asked for.
        RunError: the output exists or cannot be written.
    """
    if scheme.kind != "nf4":
        raise ConfigError(f"a merged model can be packed again as nf4 only, not {scheme}; leave out --requantize")
    state = merged_state(model)
    for name, module in packed.named_modules():
        if isinstance(module, QuantisedLinear):
            key = f"{name.removesuffix('.base')}.weight"
            state |= {f"{key}{end}": tensor for end, tensor in _stored(state.pop(key), scheme).items()}
    try:
        model.config.quantization_config = _settings(scheme, model.dtype)
        return write_state(model, tokenizer, output, state, chat_template=chat_template)
    finally:
        del model.config.quantization_config


def _stored(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one packed weight, by what bitsandbytes puts behind its name; each with memory of its own."""
    packed = quantise(weight, scheme)
    if not isinstance(packed, NF4Weight):
        raise TypeError(f"{scheme} is not stored")
    state = packed.state(packed.shape).as_dict(packed=True)
    return {"": packed.packed, **{f".{name}": tensor.clone() for name, tensor in state.items()}}


def _settings(scheme: Scheme, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scheme.kind,
        bnb_4bit_use_double_quant=scheme.double,
        bnb_4bit_compute_dtype=dtype,
    )
