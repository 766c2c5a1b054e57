"""Random adapters on the tiny models of `families.py`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from families import build_model, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import Provenance, save_adapter

NUMBERS = itertools.count()
EMBEDDING = {"gpt2": "wte", "bert": "word_embeddings", "bert-classifier": "word_embeddings"}


def learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def adapted(family: str, config: LoraConfig | None = None, seed: int = 11) -> Any:
    model = build_model(family)
    attach(model, config or LoraConfig(r=4, lora_alpha=8))
    randomise(learned(model), seed=seed, scale=0.1)
    return model


def saved(
    folder: Path, family: str = "llama", seed: int = 11, provenance: Provenance | None = None, **settings: Any
) -> Path:
    """A random adapter on disk, in a folder of its own below this one."""
    model = build_model(family)
    attach(model, LoraConfig(**settings))
    randomise(learned(model), seed=seed)
    return save_adapter(model, folder / f"adapter-{next(NUMBERS)}", provenance=provenance)


def with_tensors(path: Path, tensors: dict[str, Tensor]) -> Path:
    """The same adapter with more in its file."""
    file = path / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{k}": v for k, v in tensors.items()}, file)
    return path


def everything(family: str) -> LoraConfig:
    """Linear maps and embeddings, with all biases where there are any."""
    targets = rf".*(proj|query|key|value|dense|c_attn|c_fc|fc\d|\.q|\.k|\.v|\.o|wi|wo|{EMBEDDING.get(family, 'embed_tokens')})"
    pooler = r".*pooler.*" if family == "bert-classifier" else None
    return LoraConfig(r=4, target_modules=targets, exclude_modules=pooler, bias="all")
