"""Shapes of public models, for planning without their weights or a network.

Figures from each model's public config.json on the Hugging Face hub (the repository that each row names); the instruct
variants of a model have the same shape. Whether a row is right shows in its number of parameters, which
tests/planning/test_known_shapes.py compares with the published one.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class KnownShape(NamedTuple):
    """One model's sizes; `tied` when its output head is its embedding."""

    hub_id: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    def config(self) -> Any:
        """The transformers config of a model of this shape."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.family,
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            **({} if self.family == "gemma2" else {"sliding_window": None}),
        )


_ROWS = {
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "llama", 32, 4096, 11008, 32, 32, 128, 32000, False),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", "llama", 40, 5120, 13824, 40, 40, 128, 32000, False),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", "llama", 80, 8192, 28672, 64, 8, 128, 32000, False),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "llama", 32, 4096, 14336, 32, 8, 128, 128256, False),
    "llama-3-70b": ("meta-llama/Meta-Llama-3-70B", "llama", 80, 8192, 28672, 64, 8, 128, 128256, False),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", "llama", 32, 4096, 14336, 32, 8, 128, 128256, False),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B", "llama", 80, 8192, 28672, 64, 8, 128, 128256, False),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "llama", 16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "llama", 28, 3072, 8192, 24, 8, 128, 128256, True),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", "qwen2", 24, 896, 4864, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", "qwen2", 28, 1536, 8960, 12, 2, 128, 151936, True),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B", "qwen2", 36, 2048, 11008, 16, 2, 128, 151936, True),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", "qwen2", 28, 3584, 18944, 28, 4, 128, 152064, False),
    "qwen2.5-14b": ("Qwen/Qwen2.5-14B", "qwen2", 48, 5120, 13824, 40, 8, 128, 152064, False),
    "qwen2.5-32b": ("Qwen/Qwen2.5-32B", "qwen2", 64, 5120, 27648, 40, 8, 128, 152064, False),
    "qwen2.5-72b": ("Qwen/Qwen2.5-72B", "qwen2", 80, 8192, 29568, 64, 8, 128, 152064, False),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", "qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", "qwen3", 28, 2048, 6144, 16, 8, 128, 151936, True),
    "qwen3-4b": ("Qwen/Qwen3-4B", "qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True),
    "qwen3-8b": ("Qwen/Qwen3-8B", "qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False),
    "qwen3-14b": ("Qwen/Qwen3-14B", "qwen3", 40, 5120, 17408, 40, 8, 128, 151936, False),
    "qwen3-32b": ("Qwen/Qwen3-32B", "qwen3", 64, 5120, 25600, 64, 8, 128, 151936, False),
    "mistral-7b": ("mistralai/Mistral-7B-v0.3", "mistral", 32, 4096, 14336, 32, 8, 128, 32768, False),
    "gemma-2-2b": ("google/gemma-2-2b", "gemma2", 26, 2304, 9216, 8, 4, 256, 256000, True),
    "gemma-2-9b": ("google/gemma-2-9b", "gemma2", 42, 3584, 14336, 16, 8, 256, 256000, True),
}
KNOWN_SHAPES = {name: KnownShape(*row) for name, row in _ROWS.items()}
