"""Proofs: the base is untouched, and the merged model says what the adapter says.

The tolerance is not chosen, it is measured. The same adapter is run once more with the base's weights widened (bfloat16 to
float32, float32 to float64); the largest difference of a logit is the noise that this model's own precision makes. Two
honest computations of one function can each be off by that much, merging rounds the weights once more, and the largest
of many roundings is itself random: over tiny float32 models honest merges lay up to 3.8 noises apart (1.3 in the
median), so 4 are allowed. A control, the
adapter at scale 0, must fail the same test: a proof that anything passes proves nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twofold.adapter.attach import adapter_layers, disabled, merge, unmerge
from twofold.base.batch import Example, PackedBatch, pack, pad
from twofold.base.blocks import Decoder, describe
from twofold.base.load import Base
from twofold.errors import ProofError
from twofold.training.block import hidden_states

EXAMPLES, TOKENS = 8, 512
NOISES = 4
"""How many times the model's own rounding noise two honest computations may lie apart."""
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True)
class Verification:
    """Two sets of logits over the same tokens.

    Attributes:
        max_abs_logit_difference: the largest difference.
        top1_agreement: share of positions with the same likeliest token.
        tolerance: NOISES times this model's own rounding noise.
        control_difference: the largest difference when the adapter is at scale 0; it must exceed the tolerance.
    """

    max_abs_logit_difference: float
    top1_agreement: float
    tolerance: float
    control_difference: float

    @property
    def passed(self) -> bool:
        return self.max_abs_logit_difference <= self.tolerance < self.control_difference

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def require(self, what: str) -> Verification:
        """Raises ProofError unless it passed."""
        if self.passed:
            return self
        if self.control_difference <= self.tolerance:
            raise ProofError(
                f"{what} cannot be proved: the adapter changes no logit by more than the noise {self.tolerance:.3g}"
            )
        found = f"{self.max_abs_logit_difference:.3g} over {self.tolerance:.3g}"
        raise ProofError(f"{what} differs from the adapter by more than the model's own noise ({found}); do not use it")


def proof_batch(examples: Sequence[Example], device: torch.device) -> PackedBatch:
    """A few short examples, whose every position is compared."""
    chosen: list[Example] = []
    tokens = 0
    for example in sorted(examples, key=lambda e: len(e.token_ids))[:: max(1, len(examples) // EXAMPLES)]:
        if chosen and (len(chosen) == EXAMPLES or tokens + len(example.token_ids) > TOKENS):
            break
        chosen.append(Example(example.token_ids[:TOKENS], example.supervised[:TOKENS]))
        tokens += len(example.token_ids)
    return pack(chosen).to(device)


def pad_token(base: Base) -> int:
    """Any token will do: padding is masked and never supervised."""
    return base.tokenizer.pad_token_id or 0


@torch.no_grad()
def all_logits(model: Any, batch: PackedBatch, pad_id: int) -> Tensor:
    """Logits (rows, vocabulary) of every token of a packed batch, in float32 or wider."""
    described = describe(model)
    if isinstance(described, Decoder):
        logits: Tensor = described.head(hidden_states(described, batch))
    else:
        padded = pad(batch, pad_id)
        found = model(input_ids=padded.token_ids, attention_mask=padded.attention_mask, use_cache=False).logits
        logits = found[padded.attention_mask.bool()]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def verify_merge(model: Any, batch: PackedBatch, pad_id: int, merged: Any | None = None) -> Verification:
    """Compare the active adapter with the merged model: the one given, or weights merged in memory for the purpose."""
    kept_apart = all_logits(model, batch, pad_id)
    if merged is None:
        merge(model)
        folded = all_logits(model, batch, pad_id)
        unmerge(model)
    else:
        folded = all_logits(merged, batch, pad_id)
    return compare(model, kept_apart, folded, batch, pad_id)


def compare(model: Any, kept_apart: Tensor, other: Tensor, batch: PackedBatch, pad_id: int) -> Verification:
    """`other` against the adapter's own logits, with the noise and the control that make the figure mean something."""
    with widened(model):
        noise = _largest(kept_apart, all_logits(model, batch, pad_id))
    with disabled(model):
        control = _largest(other, all_logits(model, batch, pad_id))
    agreement = (kept_apart.argmax(-1) == other.argmax(-1)).double().mean()
    return Verification(_largest(kept_apart, other), float(agreement), NOISES * noise, control)


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """The model with every parameter in the next wider type, for the length of a `with` block; then its own bits again."""
    kept = [(p, p.data) for p in model.parameters()]
    buffers = [
        (layer, layer.merged) for _, layer in adapter_layers(model) if getattr(layer, "merged", None) is not None
    ]
    if buffers:
        raise RuntimeError("unmerge before measuring noise")
    wide = WIDER[next(p.dtype for p in model.parameters())]
    try:
        for parameter, data in kept:
            parameter.data = data.to(torch.promote_types(data.dtype, wide))
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def base_digest(model: nn.Module) -> str:
    """SHA-256 over every base tensor's bytes, adapters left out."""
    own = {id(p) for _, layer in adapter_layers(model) for p in layer.shares.parameters()}
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if id(parameter) not in own:
            flat = parameter.detach().contiguous().view(-1).view(torch.uint8).cpu()
            digest.update(flat.numpy().tobytes())
    return digest.hexdigest()
