"""Decoder layers of every structure over random float64 tensors, each also written out with autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from segment_layouts import Trees, asking, attention_by_loops, contexts, rows_of, segments_of
from torch import Tensor

from twofold.functional.attention import Scoring
from twofold.functional.gated import ACTIVATIONS
from twofold.functional.norm import Norm
from twofold.functional.rope import Angles
from twofold.functional.segments import AttentionPlan, Heads, plan_attention
from twofold.layers.block import BlockTensors, Rows, run_block
from twofold.lowrank.factors import LowRank
from twofold.lowrank.linear import Group, Projection, drop

D, FF, HEAD, TURNED, RANK = 6, 10, 4, 2, 2
HEADS = Heads(4, 2)
WIDE, NARROW = HEADS.queries * HEAD, HEADS.keys * HEAD
SCORING = Scoring(0.5)
FILLERS = 2
SEPARATE = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
FUSED = (("qkv",), ("o",), ("gate_up",), ("down",))
SHAPES = {"q": (WIDE, D), "k": (NARROW, D), "v": (NARROW, D), "qkv": (WIDE + 2 * NARROW, D), "o": (D, WIDE)} | {
    "gate": (FF, D),
    "up": (FF, D),
    "gate_up": (2 * FF, D),
    "down": (D, FF),
}
GELU = {
    "silu": torch.nn.functional.silu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Case:
    """A layer's features, and who asks it."""

    adapted: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    groups: tuple[tuple[str, ...], ...] = SEPARATE
    head_norms: bool = False
    post_norms: bool = False
    dropout: float = 0.0
    biased: tuple[str, ...] = ()
    bias_learned: bool = False
    stretched: bool = False
    frozen_A: bool = False
    activation: str = "silu"
    scoring: Scoring = SCORING
    window: int | None = None
    tree: Trees = ((0, (5, 4, 1)),)
    real: tuple[int, ...] | None = None


ALL_FUSED = ("qkv", "o", "gate_up", "down")
PREFIXED: Trees = ((4, (3, 2)), (0, (4,)))
SOME = (2, 3, 5, 8, 11)
CASES = {
    "plain": Case(),
    "head norms": Case(head_norms=True),
    "post norms": Case(post_norms=True),
    "fused": Case(ALL_FUSED, FUSED),
    "dropout": Case(dropout=0.4),
    "frozen biases": Case(biased=("q", "k", "v", "o", "gate", "up", "down")),
    "learned biases": Case(biased=("q", "v", "o", "up", "down"), bias_learned=True),
    "learned biases alone": Case((), biased=("k", "gate"), bias_learned=True),
    "stretched": Case(stretched=True, biased=("q", "o", "up")),
    "stretched, some asked": Case(stretched=True, dropout=0.4, tree=PREFIXED, real=SOME),
    "stretched, fused, some asked": Case(ALL_FUSED, FUSED, stretched=True, tree=PREFIXED, real=SOME),
    "frozen A": Case(frozen_A=True, bias_learned=True, biased=("q",)),
    "frozen A, stretched, some asked": Case(frozen_A=True, stretched=True, tree=PREFIXED, real=SOME),
    "gelu": Case(activation="gelu_pytorch_tanh"),
    "softcap and window": Case(scoring=Scoring(0.5, 1.2), window=3),
    "prefix": Case(tree=PREFIXED),
    "some asked": Case(real=(1, 4, 7, 9)),
    "prefix, some asked": Case(tree=PREFIXED, real=SOME),
    "fused, some asked": Case(ALL_FUSED, FUSED, tree=PREFIXED, real=SOME),
    "queries and values": Case(("q", "v")),
    "keys, some asked": Case(("k",), tree=PREFIXED, real=SOME),
    "mlp": Case(("up", "down")),
    "last": Case(("down",)),
    "nothing adapted": Case(()),
    "all at once": Case(
        head_norms=True,
        post_norms=True,
        dropout=0.3,
        biased=("q", "down"),
        bias_learned=True,
        activation="gelu_pytorch_tanh",
        scoring=Scoring(0.5, 1.2),
        window=4,
        tree=PREFIXED,
        real=SOME,
    ),
    "all at once, fused": Case(
        ALL_FUSED, FUSED, post_norms=True, dropout=0.3, biased=("qkv",), window=4, tree=PREFIXED, real=SOME
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Layer:
    """Random tensors for a case, the function under test and the same written out."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.segments = segments_of(case.tree)
        self.rows = rows_of(self.segments, FILLERS)
        self.asked = None if case.real is None else asking(self.rows, case.real, FILLERS)
        self.answers = (self.rows if self.asked is None else len(self.asked)) - FILLERS
        self.projections = {n: self._projection(n) for names in case.groups for n in names}
        self.norms = {n: Norm(doubles(D), 1e-5) for n in ("attention", "attention_post", "mlp", "mlp_post")}
        self.norms |= {n: Norm(doubles(HEAD), 1e-5) for n in ("q", "k")}
        half = doubles(self.rows, TURNED // 2)
        both = torch.cat([half, half], 1)
        self.cos, self.sin = both.cos(), both.sin()

    def _projection(self, name: str) -> Projection:
        out, width = SHAPES[name]
        bias = doubles(out).requires_grad_(self.case.bias_learned) if name in self.case.biased else None
        update = None
        if name in self.case.adapted:
            A = doubles(RANK, width).requires_grad_(not self.case.frozen_A)
            update = LowRank(A, doubles(out, RANK).requires_grad_(), 0.7)
        stretch = doubles(out).requires_grad_() if self.case.stretched and update is not None else None
        return Projection(doubles(out, width) / width**0.5, bias, update, stretch=stretch)

    def learned(self) -> list[Tensor]:
        return [t for p in self.projections.values() for t in p.learned()]

    def with_learned(self, learned: Sequence[Tensor]) -> dict[str, Projection]:
        """The projections, with other tensors in place of the learned ones."""
        given = iter(learned)

        def other(t: Tensor) -> Tensor:
            return next(given) if t.requires_grad else t

        return {
            name: p._replace(
                update=p.update and LowRank(other(p.update.A), other(p.update.B), p.update.scale),
                bias=None if p.bias is None else other(p.bias),
                stretch=None if p.stretch is None else other(p.stretch),
            )
            for name, p in self.projections.items()
        }

    def tensors(self, projections: dict[str, Projection]) -> BlockTensors:
        qkv, o, gate_up, down = (
            Group.of([projections[n] for n in names], torch.float64, self.case.dropout) for names in self.case.groups
        )
        post, heads = self.case.post_norms, self.case.head_norms
        return BlockTensors(
            attention_norm=self.norms["attention"],
            qkv=qkv,
            q_norm=self.norms["q"] if heads else None,
            k_norm=self.norms["k"] if heads else None,
            o=o,
            attention_post=self.norms["attention_post"] if post else None,
            mlp_norm=self.norms["mlp"],
            gate_up=gate_up,
            down=down,
            mlp_post=self.norms["mlp_post"] if post else None,
            activation=ACTIVATIONS[self.case.activation],
            scoring=self.case.scoring,
            head_dim=HEAD,
            widths=(WIDE, NARROW, NARROW),
        )

    def plan(self) -> AttentionPlan:
        return plan_attention(self.segments, self.rows, HEADS, self.cos, self.asked, self.case.window)

    def run(self, x: Tensor, *learned: Tensor) -> Tensor:
        """The filler's answers dropped; dropout drawn from the same seed every time."""
        torch.manual_seed(4)
        t, rows = self.tensors(self.with_learned(learned)), Rows(Angles.of(self.cos, self.sin), self.asked)
        return run_block(x, t, rows, self.plan(), learned)[: self.answers]

    def written_out(self, x: Tensor) -> Tensor:
        """The formula, one module after the other."""
        torch.manual_seed(4)
        everyone = torch.arange(self.rows)
        asked = everyone if self.asked is None else self.asked
        q, k, v = self._qkv(self._norm(x, "attention"))
        q, k = (self._turned(self._by_head(t, n), at) for t, n, at in ((q[asked], "q", asked), (k, "k", everyone)))
        v = v.view(self.rows, HEADS.keys, HEAD)
        out = attention_by_loops(
            q, k, v, asked[: self.answers].tolist(), contexts(self.segments, self.case.window), self.case.scoring
        )
        attended = torch.cat([out.flatten(1), torch.zeros(FILLERS, WIDE, dtype=x.dtype)])
        (o,) = self._linear(attended, ("o",))
        a = x[asked] + (self._norm(o, "attention_post") if self.case.post_norms else o)
        both = self._linear(self._norm(a, "mlp"), self.case.groups[2])
        gate, up = both if len(both) == 2 else both[0].chunk(2, -1)
        (down,) = self._linear(GELU[self.case.activation](gate) * up, ("down",))
        return (a + (self._norm(down, "mlp_post") if self.case.post_norms else down))[: self.answers]

    def _qkv(self, n: Tensor) -> Sequence[Tensor]:
        found = self._linear(n, self.case.groups[0])
        return found if len(found) == 3 else found[0].split((WIDE, NARROW, NARROW), -1)

    def _linear(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        members, found = [self.projections[n] for n in names], []
        kept = drop(x, self.case.dropout) if any(m.update for m in members) else None
        for weight, bias, update, _, stretch in members:
            y = x @ weight.T
            if update is not None:
                into = x if kept is None else torch.where(kept.mask, x, 0.0) / kept.probability
                y = y + update.scale * (into @ update.A.T @ update.B.T)
            y = y if stretch is None else y * stretch
            found.append(y if bias is None else y + bias)
        return found

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, eps = self.norms[name]
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def _by_head(self, x: Tensor, name: str) -> Tensor:
        heads = x.reshape(len(x), -1, HEAD)
        return self._norm(heads, name) if self.case.head_norms else heads

    def _turned(self, x: Tensor, rows: Tensor) -> Tensor:
        turned, rest = x[..., :TURNED], x[..., TURNED:]
        swapped = torch.cat([-turned[..., TURNED // 2 :], turned[..., : TURNED // 2]], -1)
        return torch.cat([turned * self.cos[rows, None] + swapped * self.sin[rows, None], rest], -1)
