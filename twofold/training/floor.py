"""The floor under a training step: its matrix products, and nothing else.

Every product of the step as it must be executed, at its own shapes and with the real layers' weights, one after the other: the
frozen projections and their input gradients, the low-rank products, attention's, the logits and their gradient, made by
whatever makes them in a step here: PyTorch's products, or our own kernels. Attention is taken whole where a kernel makes it in
less time than its products one by one. What a step takes beyond that is overhead; the share that the floor has in a step says
how near the machine's limit a training runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from twofold.base.batch import PackedBatch
from twofold.base.blocks import Decoder
from twofold.events import Event, Step
from twofold.functional.attention import Scoring, attention_backward, attention_forward, attention_products
from twofold.functional.loss import chunk_rows, hidden_gradient, logits_of
from twofold.functional.segments import AttentionPlan
from twofold.layers.block import BlockTensors
from twofold.lowrank.linear import Group
from twofold.lowrank.products import Term, crossed, sum_of_products
from twofold.machine import synchronise
from twofold.native.training import native_kernels
from twofold.training.block import plans_of
from twofold.training.layout import Layout, lay_out
from twofold.training.objective import FastObjective, Objective

ROUNDS = 2
Attend: TypeAlias = Callable[..., None]
"""Does what attention has to do: as `attention_products`."""


class StepTimes:
    """A subscriber that remembers how long each optimiser step took."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step):
            self.seconds[event.step - 1] = event.seconds

    def median(self) -> tuple[int, float] | None:
        """The step, counted from 0, of median duration, and that duration; None before any."""
        by_duration = sorted(self.seconds.items(), key=lambda item: item[1])
        return by_duration[len(by_duration) // 2] if by_duration else None


@dataclass(frozen=True)
class Floor:
    """A step of median duration beside its matrix products alone.

    Attributes:
        step_seconds: of the step.
        floor_seconds: of its products.
    """

    step_seconds: float
    floor_seconds: float

    @property
    def fraction(self) -> float:
        return self.floor_seconds / self.step_seconds

    def as_json(self) -> dict[str, float]:
        return {**asdict(self), "fraction": self.fraction}


def measured_floor(objective: Objective, times: StepTimes, batches: Callable[[int], list[PackedBatch]]) -> Floor | None:
    """The floor under the step of median duration; None on the plain path, whose products are its own affair."""
    median = times.median()
    if median is None or not isinstance(objective, FastObjective):
        return None
    step, seconds = median
    with native_kernels():
        return Floor(seconds, floor_seconds(objective.decoder, batches(step), share=objective.share_prefixes))


def floor_seconds(decoder: Decoder, batches: Sequence[PackedBatch], *, share: bool) -> float:
    """Seconds of a step's matrix products, forward and backward: the least of a few rounds with attention made in each way."""
    layouts = [lay_out(b, share=share) for b in batches]
    device = cast(Tensor, decoder.norm.weight).device
    rounds = []
    with torch.no_grad():
        for attend in WAYS * ROUNDS:
            synchronise(device)
            started = time.perf_counter()
            for layout in layouts:
                _products(decoder, layout, attend)
            synchronise(device)
            rounds.append(time.perf_counter() - started)
    return min(rounds)


def _whole_attention(
    plan: AttentionPlan, d: int, scoring: Scoring, operand: Callable[..., Tensor], *, backward: bool
) -> None:
    heads = plan.heads
    q = operand(len(plan.spans.asking), heads.queries, d)
    k = operand(len(plan.own_keys) // heads.keys, heads.keys, d)
    out, kept = attention_forward(q, k, k, plan, scoring)
    if backward:
        attention_backward(out, q, k, k, kept, plan, scoring)


WAYS: tuple[Attend, ...] = (attention_products, _whole_attention)
"""In which attention is made, of which the faster one counts."""


def _products(decoder: Decoder, layout: Layout, attend: Attend) -> None:
    some = _Operands(cast(Tensor, decoder.norm.weight))
    plans = plans_of(decoder, layout, some.like)
    learns_below = any(p.requires_grad for p in decoder.embedding.parameters())
    for block, plan in zip(decoder.blocks, plans, strict=True):
        asked = layout.rows if block is not decoder.blocks[-1] else len(layout.asked)
        t, learned = decoder.tensors(block)
        _block_products(t, plan, layout.rows, asked, some, attend, input_gradient=learns_below)
        learns_below |= bool(learned)
    head = cast(Tensor, decoder.head.weight)
    for hidden in some(layout.labels.numel(), head.shape[1]).split(chunk_rows(layout.labels.numel(), len(head))):
        hidden_gradient(logits_of(hidden, head), head)


class _Operands:
    """Random matrices, one of each shape."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.made: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, *shape: int) -> Tensor:
        if shape not in self.made:
            self.made[shape] = torch.randn(shape, device=self.like.device, dtype=self.like.dtype)
        return self.made[shape]


def _block_products(
    t: BlockTensors,
    plan: AttentionPlan,
    rows: int,
    asked: int,
    some: _Operands,
    attend: Attend,
    *,
    input_gradient: bool,
) -> None:
    """As `block_backward`, no gradient is formed below the lowest projection that learns."""
    apart = asked != rows and len(t.qkv.members) == 3
    for group, count in (
        [(t.qkv.part(slice(0, 1)), asked), (t.qkv.part(slice(1, 3)), rows)] if apart else [(t.qkv, rows)]
    ):
        _group_products(group, count, some, input_gradient=input_gradient)
    into_attention = input_gradient or t.qkv.learns
    attend(plan, t.head_dim, t.scoring, some, backward=into_attention)
    below = into_attention
    for group in (t.o, t.gate_up, t.down):
        _group_products(group, asked, some, input_gradient=below)
        below |= group.learns


def _group_products(group: Group, rows: int, some: _Operands, *, input_gradient: bool) -> None:
    x = some(rows, group.members[0].weight.shape[1])
    ranks = None if group.A is None else some(rows, len(group.A))
    if group.A is not None:
        sum_of_products([Term(x, group.A)])
    into = []
    for m in group.members:
        dy, h = some(rows, m.weight.shape[0]), None if m.B is None else some(rows, m.B.shape[1])
        sum_of_products([Term(x, m.weight), *([] if m.B is None or h is None else [Term(h, m.B)])])
        into.append(Term(dy, m.weight, as_read=True))
        if m.B is not None and h is not None:
            sum_of_products([Term(dy, m.B, as_read=True)])
            crossed(dy, h)
    if group.A is not None and ranks is not None:
        crossed(ranks, x)
        into.append(Term(ranks, group.A, as_read=True))
    if input_gradient:
        sum_of_products(into)
