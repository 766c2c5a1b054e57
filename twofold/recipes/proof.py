"""Proofs: the base is untouched, and the merged model says what the adapter says.

Adapter and merged model are one function, rounded at different places. What merging itself does, namely to round each
merged weight once, shows when both are run with their weights widened (bfloat16 to float32, float32 to float64): then nothing
else is rounded that much. The tolerance is not chosen but measured: how far the adapter's logits move between the model's
own precision and the wide one, plus how far the merged model's do; the noise that serving the two in that precision brings
anyway. A control, the adapter at scale 0, must fail the same comparison: a proof that anything passes proves nothing.

A proof must fit where training fitted. Weights are widened, and merged, one at a time as they are used; logits are compared
at as many rows as `PROOF_LOGITS` allows, spread evenly, and at most three sets of them are alive. The largest part left is
one merged weight while it is formed, which `planning.memory` knows of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from twofold.adapter.attach import adapter_layers, disabled, folding
from twofold.base.batch import Example, PackedBatch, pack, pad
from twofold.base.blocks import Decoder, describe
from twofold.base.load import Base
from twofold.errors import ProofError
from twofold.events import Emit, Warned, silent
from twofold.functional.widen import Widened
from twofold.layers.quantised import QuantisedLinear
from twofold.machine import memory_ran_out
from twofold.planning.memory import PROOF_LOGITS, PROOF_TOKENS
from twofold.training.block import all_states
from twofold.training.objective import head_shown
from twofold.training.tasks import task_objective

EXAMPLES = 8
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
        return not self.differs and not self.inconclusive

    @property
    def differs(self) -> bool:
        """By more than noise, or by NaN."""
        return not self.max_abs_logit_difference <= self.tolerance

    @property
    def inconclusive(self) -> bool:
        """The adapter is too weak to be told from its absence, so that no comparison could fail."""
        return self.control_difference <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "inconclusive": self.inconclusive}

    def complaint(self, what: str) -> str | None:
        """What is wrong with `what`, or with the proof; None where it passed."""
        found = f"{self.max_abs_logit_difference:.3g} over {self.tolerance:.3g}"
        if self.differs:
            return (
                f"{what} differs from the adapter by more than the model's own noise ({found}): its weights round away too much of "
                "so small an update; do not use it, but the adapter apart, or merge into float32"
            )
        if self.inconclusive:
            return f"nothing is proved of {what}: the adapter changes no logit by more than {self.tolerance:.3g}"
        return None

    def require(self, what: str, emit: Emit = silent) -> None:
        """Raises ProofError if `what` differs from the adapter; warns if the adapter is too weak for a proof."""
        if self.differs:
            raise ProofError(self.complaint(what))
        self.warn(what, emit)

    def warn(self, what: str, emit: Emit) -> None:
        """Say what is wrong, where nothing depends on it yet."""
        if complaint := self.complaint(what):
            emit(Warned(text=complaint))


def proof_batch(examples: Sequence[Example], device: torch.device) -> PackedBatch:
    """A few short examples to compare logits on."""
    chosen: list[Example] = []
    tokens = 0
    for example in sorted(examples, key=lambda e: len(e.token_ids))[:: max(1, len(examples) // EXAMPLES)]:
        if chosen and (len(chosen) == EXAMPLES or tokens + len(example.token_ids) > PROOF_TOKENS):
            break
        chosen.append(example.first(PROOF_TOKENS))
        tokens += len(example.token_ids)
    return pack(chosen).to(device)


def pad_token(base: Base) -> int:
    """Any token will do: padding is masked and never supervised."""
    return base.tokenizer.pad_token_id or 0


@torch.no_grad()
def logits_at(model: Any, batch: PackedBatch, rows: Tensor, pad_id: int) -> Tensor:
    """Logits (rows, choices) at these tokens of a packed batch, or of these predictions of a task's, in float32 or wider."""
    task, described = task_objective(model, pad_id), describe(model)
    if task is not None:
        logits = task.logits(batch)[rows]
    elif isinstance(described, Decoder):
        logits = described.logits(all_states(described, batch.to(torch.device("cpu")))[rows])
    else:
        padded = pad(batch, pad_id)
        with head_shown(model, padded.attention_mask.flatten().nonzero()[rows, 0]):
            found = model(input_ids=padded.token_ids, attention_mask=padded.attention_mask, use_cache=False)
        logits = found.logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def compared_rows(model: Any, batch: PackedBatch) -> Tensor:
    """Every token of a batch (or what a task predicts of it), or as many, spread evenly, as keep one set of logits small; always
    the last."""
    vocabulary: int = model.config.get_text_config().vocab_size
    task = task_objective(model, pad_id=0)
    there = batch.tokens if task is None else task.predictions(batch)
    count = min(there, max(1, PROOF_LOGITS // vocabulary))
    return torch.arange(1, count + 1, device=batch.token_ids.device) * there // count - 1


def verify_merge(model: Any, batch: PackedBatch, pad_id: int, merged: Any | None = None) -> Verification:
    """Compare the active adapter with the merged model: the one given, or weights merged as they are used."""
    if merged is not None:
        return compare(model, both_logits(merged, batch, pad_id), batch, pad_id)
    with folding(model):
        folded = both_logits(model, batch, pad_id)
    return compare(model, folded, batch, pad_id)


class BothLogits(NamedTuple):
    """One model's logits (rows, vocabulary) with every weight widened, and how far its own precision moves any of them."""

    wide: Tensor
    noise: float


def both_logits(model: Any, batch: PackedBatch, pad_id: int) -> BothLogits:
    """Run a batch twice, where the batch is; the model's weights may be elsewhere, and come when used."""
    rows = compared_rows(model, batch)
    device, dtype = batch.token_ids.device, own_dtype(model)
    with nullcontext() if model.device == device else Widened(dtype, device):
        served = logits_at(model, batch, rows, pad_id)
    wide = wide_logits(model, batch, rows, pad_id)
    return BothLogits(wide, _largest(served, wide))


def wide_logits(model: Any, batch: PackedBatch, rows: Tensor, pad_id: int) -> Tensor:
    """`logits_at` with every weight in the next wider type."""
    with Widened(WIDER[own_dtype(model)], batch.token_ids.device):
        return logits_at(model, batch, rows, pad_id)


def own_dtype(model: nn.Module) -> torch.dtype:
    """The type of a model's first weight that is no packed integer."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def compare(model: Any, other: BothLogits, batch: PackedBatch, pad_id: int) -> Verification:
    """The active adapter's logits against another model's over the same batch."""
    apart, noise = both_logits(model, batch, pad_id)
    difference = _largest(apart, other.wide)
    agreement = float((apart.argmax(-1) == other.wide.argmax(-1)).double().mean())
    del apart
    with disabled(model):
        control = wide_logits(model, batch, compared_rows(model, batch), pad_id)
    return Verification(difference, agreement, noise + other.noise, _largest(control, other.wide))


def _largest(a: Tensor, b: Tensor) -> float:
    """The largest difference, taken a few rows at a time; NaN where either holds one."""
    pairs = zip(a.split(8), b.split(8), strict=True)
    return float(torch.stack([(x.double() - y.double()).abs().max() for x, y in pairs]).max())


Proved = TypeVar("Proved")


def within_memory(prove: Callable[[], Proved], emit: Emit) -> tuple[Proved | None, str | None]:
    """What `prove` returns, or why memory did not suffice for it: hours of training are not lost for want of a proof."""
    try:
        return prove(), None
    except Exception as error:
        if not memory_ran_out(error):
            raise
        reason = f"memory ran out in the proof ({(str(error) or type(error).__name__).splitlines()[0]})"
    emit(Warned(text=f"nothing is proved: {reason}; what was written stays, and `twofold merge` proves it again"))
    return None, reason


def base_digest(model: nn.Module) -> str:
    """SHA-256 over every base tensor's bytes, the scales of packed ones too, adapters left out."""
    own = {id(p) for _, layer in adapter_layers(model) for p in layer.shares.parameters()}
    scales = (s for m in model.modules() if isinstance(m, QuantisedLinear) for s in m.frozen().scales().values())
    digest = hashlib.sha256()
    for tensor in (*(p for p in model.parameters() if id(p) not in own), *scales):
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
