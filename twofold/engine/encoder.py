"""Texts as vectors, by an encoder: the mean over a text's tokens, as long as one.

https://arxiv.org/abs/1908.10084; the pooling is what `1_Pooling/config.json` says where an encoder has that file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from twofold.base.load import locate, public_name
from twofold.errors import BaseError
from twofold.events import Emit, silent, working

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class Encoder:
    """An encoder ready to work.

    Attributes:
        name: what requests call it.
        longest: most tokens of a text.
    """

    name: str
    model: Any
    tokenizer: Any
    pooling: Pooling
    longest: int

    @property
    def width(self) -> int:
        """How many numbers a vector has."""
        return int(self.model.config.hidden_size)

    def tokens(self, text: str) -> list[int]:
        """A text's tokens with those that the encoder wants around them."""
        found: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return found

    @torch.no_grad()
    def embed(self, texts: Sequence[list[int]]) -> Float[Tensor, "texts width"]:
        """One vector of length 1 for each text, whatever its neighbours; texts are tokens, each at least one."""
        ids = pad_sequence([torch.tensor(t) for t in texts], batch_first=True)
        lengths = torch.tensor([[len(t)] for t in texts])
        mask = torch.arange(ids.shape[1]) < lengths
        device = self.model.device
        states = self.model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).last_hidden_state
        return normalize(_pooled(states, mask.to(device), self.pooling).float(), dim=1).cpu()


def _pooled(
    states: Float[Tensor, "texts length width"], mask: Tensor, pooling: Pooling
) -> Float[Tensor, "texts width"]:
    if pooling == "cls":
        return states[:, 0]
    return (states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def load_encoder(reference: str, emit: Emit = silent) -> Encoder:
    """Load an encoder, in float32.

    Raises:
        BaseError: nothing is found under that reference, it cannot be read, or it pools in a way that is not done.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        source = locate(reference, emit)
        with working(f"loading the encoder {reference}", emit):
            tokenizer = AutoTokenizer.from_pretrained(source)
            model, told = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise BaseError(f"cannot load an encoder from {reference}: {(str(error).splitlines() or ['?'])[0]}") from error
    if lacking := sorted(k for k in told["missing_keys"] if not k.startswith("pooler.")):
        raise BaseError(f"{reference} is no whole encoder: it lacks {', '.join(lacking[:4])}")
    longest = min(int(model.config.max_position_embeddings), int(tokenizer.model_max_length))
    name = public_name(reference)
    return Encoder(name, model.eval().requires_grad_(False), tokenizer, _pooling(Path(source), reference), longest)


def _pooling(source: Path, reference: str) -> Pooling:
    described = source / "1_Pooling" / "config.json"
    if not described.is_file():
        return "mean"
    said = json.loads(described.read_text(encoding="utf-8"))
    modes = [key for key, chosen in said.items() if key.startswith("pooling_mode_") and chosen is True]
    known: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise BaseError(
            f"{reference} pools by {' and '.join(modes) or 'nothing'}; the mean and the first token are done here"
        )
    return known[modes[0]]
