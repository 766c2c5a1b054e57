"""What a GGUF file says of a model besides its tensors and its tokens, family by family.

Keys and rules are those of llama.cpp's convert_hf_to_gguf.py (MIT licence). Where llama.cpp computes something else than the config
asks for, that is refused, or said where it shows only in long texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import gguf
import torch
from torch import Tensor

from twofold.errors import ConfigError

Settings: TypeAlias = Mapping[str, Any]
"""A transformers configuration as a dictionary."""
LARGE_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the one size of each for which llama.cpp scales attention by hidden size over heads."""
ACTIVATIONS = {
    "gemma": ("gelu_pytorch_tanh", "gelu"),
    "gemma2": ("gelu_pytorch_tanh",),
    "gemma3": ("gelu_pytorch_tanh",),
}
PATTERNS = {"gemma2": 2, "gemma3": 6}
"""Every so manieth layer of these attends to everything, unless the file says which."""


def add_settings(writer: gguf.GGUFWriter, config: Settings, architecture: str) -> None:
    """Write a model's sizes and constants.

    Raises:
        ConfigError: llama.cpp would compute something else.
    """
    _check(config, architecture)
    _add_common(writer, config)
    _add_attention(writer, config, architecture)
    if architecture != "phi3":
        _add_rope_scaling(writer, _rope(config), architecture)
    {"llama": _add_llama, "smollm3": _add_llama, "phi3": _add_phi3}.get(architecture, _nothing)(writer, config)


def _nothing(writer: gguf.GGUFWriter, config: Settings) -> None:
    """Most families have no settings of their own."""


def _add_common(writer: gguf.GGUFWriter, config: Settings) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_attention(writer: gguf.GGUFWriter, config: Settings, architecture: str) -> None:
    if architecture != "phi3" and config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"] or 0.0)
        writer.add_final_logit_softcapping(config["final_logit_softcapping"] or 0.0)
    if architecture == "gemma3":
        writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
        if config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if architecture in PATTERNS:
        writer.add_sliding_window(config["sliding_window"])
        windowed = [kind == "sliding_attention" for kind in config["layer_types"]]
        if windowed != [(i + 1) % PATTERNS[architecture] != 0 for i in range(len(windowed))]:
            writer.add_sliding_window_pattern(windowed)


def _rope(config: Settings) -> Settings:
    """Of the layers that attend to everything, where layers differ."""
    found: Settings = config.get("rope_parameters") or {}
    of_all: Settings = found.get("full_attention", found)
    return of_all


def _add_rope_scaling(writer: gguf.GGUFWriter, rope: Settings, architecture: str) -> None:
    if architecture in ("gemma", "gemma2"):
        return  # theirs is llama.cpp's own default
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        further: dict[str, Callable[[float], None]] = {
            "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
            "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
            "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
        }
        for key, add in further.items():
            if rope.get(key) is not None:
                add(rope[key])


def _add_llama(writer: gguf.GGUFWriter, config: Settings) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(_head_size(config))


def _add_phi3(writer: gguf.GGUFWriter, config: Settings) -> None:
    rope, longest = _rope(config), config["max_position_embeddings"]
    first = _first_length(config)
    writer.add_rope_scaling_orig_ctx_len(first)
    writer.add_rope_dimension_count(_turned(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(config.get("sliding_window") or 0)
    if rope.get("long_factor"):
        growth = longest / first
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(growth) / math.log(first)) if growth > 1 else 1.0)


def _first_length(config: Settings) -> int:
    """Of texts before the context was made longer."""
    known = _rope(config).get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return int(known or config["max_position_embeddings"])


def _turned(config: Settings) -> int:
    """How many values of a head its rotary embedding turns."""
    share = _rope(config).get("partial_rotary_factor") or 1.0
    return int(share * config["hidden_size"]) // int(config["num_attention_heads"])


def _head_size(config: Settings) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def further_tensors(config: Settings, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """By llama.cpp's names, the tensors that it wants beside the model's own: factors of rotary frequencies."""
    rope = _rope(config)
    if architecture == "phi3" and rope.get("long_factor"):
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"], dtype=torch.float32)
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"], dtype=torch.float32)
    elif rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _slowed(config, rope)


def _slowed(config: Settings, rope: Settings) -> Tensor:
    """Llama 3.1's: by how much each frequency is divided; in float32 throughout, as the model has it."""
    size = _head_size(config)
    first = rope["original_max_position_embeddings"]
    low, high = first / rope["low_freq_factor"], first / rope["high_freq_factor"]
    found: list[float | Tensor] = []
    for frequency in 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size):
        length = 2 * math.pi / frequency
        if length < high:
            found.append(1.0)
        elif length > low:
            found.append(rope["factor"])
        else:
            share = (first / length - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            found.append(1 / ((1 - share) / rope["factor"] + share))
    return torch.tensor(found, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------- what llama.cpp does otherwise


def _check(config: Settings, architecture: str) -> None:
    problems = list(_otherwise(config, architecture))
    if problems:
        raise ConfigError(
            f"llama.cpp's {architecture} would compute something else than this model: {'; '.join(problems)}"
        )


def _otherwise(config: Settings, architecture: str) -> Iterator[str]:
    usual = ACTIVATIONS.get(architecture, ("silu",))
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in usual:
        yield f"its activation is {activation}, there it is {usual[0]}"
    kind = _rope(config).get("rope_type", "default")
    known = ("default", "longrope") if architecture == "phi3" else ("default", "linear", "yarn", "llama3")
    if kind not in known:
        yield f"its rotary embedding is scaled by '{kind}'"
    layers = config["num_hidden_layers"]
    if architecture == "smollm3" and list(config["no_rope_layers"]) != [int((i + 1) % 4 != 0) for i in range(layers)]:
        yield "there, every fourth layer is without rotary embedding (no_rope_layers)"
    if architecture in LARGE_GEMMA:
        wide = config["hidden_size"] // config["num_attention_heads"]
        there = wide if layers == LARGE_GEMMA[architecture] else _head_size(config)
        if config["query_pre_attn_scalar"] != there:
            yield f"its query_pre_attn_scalar is {config['query_pre_attn_scalar']}, there it is {there}"


def ignored_window(config: Settings, architecture: str) -> int | None:
    """The tokens beyond which llama.cpp attends to more than the model does; None where it never does."""
    window = config.get("sliding_window")
    if architecture in PATTERNS or not window or config.get("use_sliding_window") is False:
        return None
    return int(window) if window < config["max_position_embeddings"] else None
