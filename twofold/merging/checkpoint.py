"""A base with an adapter folded in, as a standard Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twofold import atomic
from twofold.adapter.attach import adapter_layers
from twofold.base.stored import copy_others
from twofold.errors import ConfigError
from twofold.layers.protocol import AdapterLayer
from twofold.layers.quantised import packed_as


def write_merged(
    model: Any, tokenizer: Any, output: Path, *, chat_template: str | None = None, source: Path | None = None
) -> Path:
    """Write the model with its active adapters folded in; the model and the tokenizer are left as they are.

    Sums are made in float32 and rounded once to the base's type. Where an update lands on one of two tied weights, the
    tie is cut and both are written, so that the other one keeps its values.

    Args:
        source: the base's folder, whose files besides weights, config and tokenizer go along.

    Raises:
        ConfigError: no adapter is active.
        RunError: the output exists or cannot be written.
    """
    return write_state(model, tokenizer, output, merged_state(model), chat_template=chat_template, source=source)


def write_state(
    model: Any,
    tokenizer: Any,
    output: Path,
    state: dict[str, Tensor],
    *,
    chat_template: str | None = None,
    source: Path | None = None,
    replace: bool = False,
) -> Path:
    """Write these tensors as the model's, with its config and the tokenizer; with `replace`, over what is there."""
    untied = cut_ties(model, state)
    tied_before = model.config.tie_word_embeddings
    template_before = tokenizer.chat_template
    try:
        tokenizer.chat_template = template_before if chat_template is None else chat_template
        model.config.tie_word_embeddings = tied_before and not untied
        with atomic.new_folder(output, replace=replace) as folder:
            if source is not None:
                copy_others(source, folder)
            model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
            usual = (folder / "config.json").stat().st_mode
            for shard in folder.glob("*.safetensors"):
                shard.chmod(usual)  # safetensors makes files that nobody but their owner may read
    finally:
        model.config.tie_word_embeddings = tied_before
        tokenizer.chat_template = template_before
    return output


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the bare model with the active adapters folded in, by the bare model's names.

    Raises:
        ConfigError: no adapter is active, or the base's own weights are packed.
    """
    check_mergeable(model)
    state = dict(model.state_dict())
    changed = {layer: layer.folded() for _, layer in adapter_layers(model) if layer.active()}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, AdapterLayer):
            for key in [k for k in state if k.startswith(f"{name}.")]:
                del state[key]
            found = layer.base.state_dict() | changed.get(layer, {})
            state |= {f"{name}.{key}": value for key, value in found.items()}
    return state


def check_mergeable(model: nn.Module) -> None:
    """Raises ConfigError if no adapter is active, or the base's own weights are packed."""
    if not any(layer.active() for _, layer in adapter_layers(model)):
        raise ConfigError("no adapter is active, so there is nothing to merge")
    if packed_as(model) is not None:
        raise ConfigError(
            "adapters are merged into the 16-bit base and never into a quantised one; load the base without quantization"
        )


def cut_ties(model: Any, state: dict[str, Tensor]) -> bool:
    """Whether the input and output embeddings, tied in the base, differ once merged; if not, the state gets one tensor for both."""
    names = {id(m): n for n, m in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model.config.tie_word_embeddings:
        return False
    first, second = (f"{names[id(m)]}.weight" for m in (embedding, head))
    if first not in state or second not in state:
        return False
    if not torch.equal(state[first], state[second]):
        return True
    state[second] = state[first]
    return False
