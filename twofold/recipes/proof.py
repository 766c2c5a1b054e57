"""Proofs: the base is untouched, and the merged model says what the adapter says.

Adapter and merged model are one function, rounded at different places. What merging itself does, namely to round each
merged weight once, shows when both are run with their weights widened (bfloat16 to float32, float32 to float64): then nothing
else is rounded that much. The tolerance is not chosen but measured: how far the adapter's logits move between the model's
own precision and the wide one, plus how far the merged model's do; the noise that serving the two in that precision brings
anyway. A control, the adapter at scale 0, must fail the same comparison: a proof that anything passes proves nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from twofold.adapter.attach import adapter_layers, disabled, merge, unmerge
from twofold.base.batch import Example, PackedBatch, pack, pad
from twofold.base.blocks import Decoder, describe
from twofold.base.load import Base
from twofold.errors import ProofError
from twofold.events import Emit, Warned, silent
from twofold.layers.embedding import LoraEmbedding
from twofold.layers.linear import LoraLinear
from twofold.training.block import all_states

EXAMPLES, TOKENS = 8, 512
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True)
class Verification:
    """Two sets of logits over the same tokens, both with widened weights.

    Attributes:
        max_abs_logit_difference: the largest difference.
        top1_agreement: share of positions with the same likeliest token.
        tolerance: the largest difference of each model's logits between its own precision and the wide one, summed.
        control_difference: the largest difference when the adapter is at scale 0; it must exceed the tolerance.
    """

    max_abs_logit_difference: float
    top1_agreement: float
    tolerance: float
    control_difference: float

    @property
    def passed(self) -> bool:
        return self.max_abs_logit_difference <= self.tolerance < self.control_difference

    @property
    def inconclusive(self) -> bool:
        """The adapter is too weak to be told from its absence, so that no comparison could fail."""
        return self.control_difference <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "inconclusive": self.inconclusive}

    def require(self, what: str, emit: Emit = silent) -> Verification:
        """Raises ProofError if `what` differs from the adapter; warns if the adapter is too weak for a proof."""
        if self.max_abs_logit_difference > self.tolerance:
            found = f"{self.max_abs_logit_difference:.3g} over {self.tolerance:.3g}"
            raise ProofError(
                f"{what} differs from the adapter by more than the model's own noise ({found}); do not use it"
            )
        if self.inconclusive:
            emit(
                Warned(
                    text=f"nothing is proved of {what}: the adapter changes no logit by more than {self.tolerance:.3g}"
                )
            )
        return self


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
        logits = described.logits(all_states(described, batch.to(torch.device("cpu"))))
    else:
        padded = pad(batch, pad_id)
        found = model(input_ids=padded.token_ids, attention_mask=padded.attention_mask, use_cache=False).logits
        logits = found[padded.attention_mask.bool()]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def verify_merge(model: Any, batch: PackedBatch, pad_id: int, merged: Any | None = None) -> Verification:
    """Compare the active adapter with the merged model: the one given, or weights merged in memory for the purpose."""
    if merged is not None:
        return compare(model, both_logits(merged, batch, pad_id), batch, pad_id)
    merge(model)
    try:
        folded = both_logits(model, batch, pad_id)
    finally:
        unmerge(model)
    return compare(model, folded, batch, pad_id)


class BothLogits(NamedTuple):
    """One model's logits (rows, vocabulary) over a batch, in its own precision and with every weight widened."""

    served: Tensor
    wide: Tensor

    @property
    def noise(self) -> float:
        return _largest(self.served, self.wide)


def both_logits(model: Any, batch: PackedBatch, pad_id: int) -> BothLogits:
    """Run a batch twice."""
    served = all_logits(model, batch, pad_id)
    with widened(model):
        return BothLogits(served, all_logits(model, batch, pad_id))


def compare(model: Any, other: BothLogits, batch: PackedBatch, pad_id: int) -> Verification:
    """The active adapter's logits against another model's over the same batch."""
    apart = both_logits(model, batch, pad_id)
    with disabled(model), widened(model):
        control = all_logits(model, batch, pad_id)
    agreement = (apart.wide.argmax(-1) == other.wide.argmax(-1)).double().mean()
    tolerance = apart.noise + other.noise
    return Verification(_largest(apart.wide, other.wide), float(agreement), tolerance, _largest(control, other.wide))


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """The model with every weight in the next wider type, for the length of a `with` block; then its own bits again."""
    parameters = [(p, p.data) for p in model.parameters()]
    wide = WIDER[parameters[0][1].dtype]
    folded = [
        (layer, layer.merged) for _, layer in adapter_layers(model) if isinstance(layer, LoraLinear | LoraEmbedding)
    ]
    try:
        for parameter, data in parameters:
            parameter.data = data.to(torch.promote_types(data.dtype, wide))
        for layer, merged in folded:
            layer.merged = None if merged is None else merged.to(wide)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for layer, merged in folded:
            layer.merged = merged


def base_digest(model: nn.Module) -> str:
    """SHA-256 over every base tensor's bytes, adapters left out."""
    own = {id(p) for _, layer in adapter_layers(model) for p in layer.shares.parameters()}
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if id(parameter) not in own:
            flat = parameter.detach().contiguous().view(-1).view(torch.uint8).cpu()
            digest.update(flat.numpy().tobytes())
    return digest.hexdigest()
