"""Random adapters on the tiny models of `families.py`."""

from __future__ import annotations

from typing import Any

from families import build_model, randomise
from torch import nn

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig

EMBEDDING = {"gpt2": "wte", "bert": "word_embeddings", "bert-classifier": "word_embeddings"}


def learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def adapted(family: str, config: LoraConfig | None = None, seed: int = 11) -> Any:
    model = build_model(family)
    attach(model, config or LoraConfig(r=4, lora_alpha=8))
    randomise(learned(model), seed=seed, scale=0.1)
    return model


def everything(family: str) -> LoraConfig:
    """Linear maps and embeddings, with all biases where there are any."""
    targets = rf".*(proj|query|key|value|dense|c_attn|c_fc|fc\d|\.q|\.k|\.v|\.o|wi|wo|{EMBEDDING.get(family, 'embed_tokens')})"
    pooler = r".*pooler.*" if family == "bert-classifier" else None
    return LoraConfig(r=4, target_modules=targets, exclude_modules=pooler, bias="all")
