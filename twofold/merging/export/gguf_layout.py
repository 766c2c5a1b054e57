"""How llama.cpp calls and lays the linear weights of the families that it and Hugging Face both know.

Names are the `gguf` package's own. Llama's rotary embedding turns neighbouring values of a head in llama.cpp, and values half a
head apart in transformers, so rows of q and k change places (`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from twofold.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Family:
    """`turned`: whether rows of q and k change places; `from_one`: whether norms are stored as their difference from one."""

    architecture: str
    turned: bool = False
    from_one: bool = False


FAMILIES = {
    "llama": Family("llama", turned=True),
    "mistral": Family("llama", turned=True),
    "smollm3": Family("smollm3", turned=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "gemma": Family("gemma", from_one=True),
    "gemma2": Family("gemma2", from_one=True),
    "gemma3_text": Family("gemma3", from_one=True),
}
"""By the `model_type` of a config."""


@dataclass(frozen=True)
class Layout:
    """Names and rows of one base."""

    family: Family
    heads: int
    key_heads: int
    tied: bool
    names: Any

    @classmethod
    def of(cls, config: Any) -> Layout:
        """From a transformers configuration.

        Raises:
            ConfigError: a family whose layout in llama.cpp is not written down here.
        """
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise ConfigError(
                f"how llama.cpp lays {config.model_type}{did_you_mean(config.model_type, FAMILIES)} is not known here (known are "
                f"{', '.join(FAMILIES)}); use llama.cpp's own convert_lora_to_gguf.py or convert_hf_to_gguf.py on the folder"
            )
        architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(family, config.num_attention_heads, keys, bool(config.tie_word_embeddings), names)

    def name(self, key: str) -> str:
        """What llama.cpp calls a tensor.

        Raises:
            ConfigError: it has no such tensor.
        """
        found: str | None = self.names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None or (found == "output.weight" and (self.tied or self.family.from_one)):
            raise ConfigError(
                f"llama.cpp has no tensor for '{key}' in a {self.family.architecture} model"
                + (", whose output head is its embedding" if found else "")
            )
        return found

    def rows(self, key: str, tensor: Tensor) -> Tensor:
        """A weight, or what is multiplied last for it, with its rows as llama.cpp lays them."""
        heads = self._heads(key)
        return tensor if heads is None else _swapped(tensor, heads, 2)

    def rows_back(self, key: str, tensor: Tensor) -> Tensor:
        """The reverse of `rows`."""
        heads = self._heads(key)
        return tensor if heads is None else _swapped(tensor, heads, len(tensor) // heads // 2)

    def stored(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of the model as llama.cpp keeps it; norms that are kept as their difference from one come whole, in float32."""
        return tensor.float() + 1 if self._from_one(key) else self.rows(key, tensor)

    def stored_back(self, key: str, tensor: Tensor) -> Tensor:
        """The reverse of `stored`."""
        return tensor.float() - 1 if self._from_one(key) else self.rows_back(key, tensor)

    def _from_one(self, key: str) -> bool:
        return self.family.from_one and key.endswith("norm.weight")

    def _heads(self, key: str) -> int | None:
        if not self.family.turned:
            return None
        return {"q_proj": self.heads, "k_proj": self.key_heads}.get(key.split(".")[-2])


def _swapped(tensor: Tensor, heads: int, parts: int) -> Tensor:
    """The rows of each head, in so many parts, column by column instead of row by row."""
    return (
        tensor.reshape(heads, parts, len(tensor) // heads // parts, *tensor.shape[1:])
        .transpose(1, 2)
        .reshape(tensor.shape)
    )


def as_tensor(data: Any) -> Tensor:
    """A copy of what the reader maps from a file."""
    return torch.from_numpy(data.copy())
