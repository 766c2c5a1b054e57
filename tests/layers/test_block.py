"""A decoder layer as one node: against the layer written out with autograd in float64, and what it keeps and leaves undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_cases import (
    ALL_FUSED,
    CASES,
    EVERY,
    FF,
    FILLERS,
    FUSED,
    HEADS,
    NARROW,
    PREFIXED,
    RANK,
    SHAPES,
    SOME,
    WIDE,
    Case,
    D,
    Layer,
    doubles,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twofold.functional import attention


@EVERY
def test_outputs_and_gradients_are_those_of_the_layer_written_out(name: str) -> None:
    layer = Layer(CASES[name])
    x, learned = doubles(layer.rows, D).requires_grad_(), layer.learned()
    found, expected = layer.run(x, *learned), layer.written_out(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weights).sum(), [x, *learned])
    theirs = torch.autograd.grad((expected * weights).sum(), [x, *learned])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert a.is_contiguous()
    assert not ours[0][-FILLERS:].any()


@EVERY
@pytest.mark.parametrize("below", [True, False], ids=["input", "learned only"])
def test_gradcheck(name: str, below: bool) -> None:
    layer = Layer(CASES[name])
    if below or layer.learned():
        x = doubles(layer.rows, D).requires_grad_(below)
        assert torch.autograd.gradcheck(layer.run, (x, *layer.learned()), fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "prefix, some asked", "softcap and window"])
def test_gradients_do_not_depend_on_what_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(CASES[name])
    x, learned = doubles(layer.rows, D).requires_grad_(), layer.learned()
    found = []
    for keys in (512, 0):
        monkeypatch.setattr(attention, "KEEP_UP_TO", keys)
        found.append(torch.autograd.grad(layer.run(x, *learned).square().sum(), [x, *learned]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------- memory


def bytes_kept(run: Callable[[], Tensor]) -> int:
    """Bytes of the storages that are alive for the backward, each counted once and whole, however little of it is looked at."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


def expected_bytes(layer: Layer) -> int:
    """As the docstring of the module lists it: numbers of 8 bytes, and dropout's masks of one."""
    case, every = layer.case, layer.rows
    asked = every if layer.asked is None else len(layer.asked)
    numbers = every * D + asked * WIDE + 2 * every * NARROW  # x, q, k and v
    numbers += asked * (WIDE + D + 2 * FF)  # the output of attention, a, gate and up
    numbers += every + asked  # 1 / rms of x and a
    for group in case.groups:
        for name in group:
            rows = every if name in ("k", "v", "qkv") else asked
            numbers += rows * RANK * (name in case.adapted)
            numbers += rows * SHAPES[name][0] * case.stretched  # outputs before they are stretched
    if case.head_norms:  # their inputs
        numbers += asked * WIDE + every * NARROW
    if case.post_norms:
        numbers += 2 * asked * D
    masks = every * D + asked * (WIDE + D + FF) if case.dropout else 0
    return 8 * numbers + masks


@EVERY
def test_nothing_is_kept_for_the_backward_but_what_is_listed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEEP_UP_TO", 0)
    layer = Layer(CASES[name])
    x = doubles(layer.rows, D).requires_grad_()
    assert bytes_kept(lambda: layer.run(x, *layer.learned())) == expected_bytes(layer)


@pytest.mark.parametrize("name", ["plain", "prefix, some asked"])
def test_probabilities_are_kept_besides_where_few_keys_are_seen(name: str) -> None:
    layer = Layer(CASES[name])
    x = doubles(layer.rows, D).requires_grad_()
    scores = sum(
        b.segments * HEADS.keys * (c.queries.stop - c.queries.start) * (c.keys.stop - c.keys.start)
        for b in layer.plan().buckets
        for c in b.chunks
    )
    assert bytes_kept(lambda: layer.run(x, *layer.learned())) == expected_bytes(layer) + 8 * scores


# ---------------------------------------------------------------------------------------- work not done

VIEWS = {
    "t",
    "detach",
    "view",
    "transpose",
    "alias",
    "slice",
    "select",
    "_unsafe_view",
    "expand",
    "as_strided",
    "lift_fresh",
}


class Used(TorchDispatchMode):
    """Which of some tensors are computed with, and how many batched products run."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {t.untyped_storage().data_ptr(): n for n, t in tensors.items()}
        self.found: set[str] = set()
        self.batched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket.__name__
        self.batched += operation == "bmm"
        if operation not in VIEWS:
            tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
            self.found |= {self.names.get(t.untyped_storage().data_ptr(), "") for t in tensors} - {""}
        return func(*args, **(kwargs or {}))


def used_backward(case: Case, *, below: bool) -> Used:
    layer = Layer(case)
    y = layer.run(doubles(layer.rows, D).requires_grad_(below), *layer.learned())
    with Used({n: p.weight for n, p in layer.projections.items()}) as used:
        y.backward(torch.ones_like(y))
    return used


@pytest.mark.parametrize(
    ("case", "weights", "attends"),
    [
        (Case(("down",)), set(), False),
        (Case((), biased=("down",), bias_learned=True), set(), False),
        (Case(("up", "down")), {"down"}, False),
        (Case((), biased=("gate",), bias_learned=True), {"down"}, False),
        (Case(("o", "down")), {"down", "gate", "up"}, False),
        (Case(("v",)), {"down", "gate", "up", "o"}, True),
        (Case((), biased=("k",), bias_learned=True), {"down", "gate", "up", "o"}, True),
        (Case(("q", "k", "v", "o", "gate", "up", "down")), {"down", "gate", "up", "o"}, True),
        (Case(("q",), tree=PREFIXED, real=SOME), {"down", "gate", "up", "o"}, True),
        (Case(("gate_up",), FUSED), {"down"}, False),
        (Case(("qkv",), FUSED), {"down", "gate_up", "o"}, True),
    ],
    ids=lambda v: "+".join(v.adapted) or f"bias of {v.biased[0]}" if isinstance(v, Case) else "",
)
def test_the_backward_stops_below_the_lowest_learned_projection(case: Case, weights: set[str], attends: bool) -> None:
    """A frozen weight is computed with in the backward only on the way down to something that learns."""
    used = used_backward(case, below=False)
    assert used.found == weights
    assert (used.batched > 0) == attends


@pytest.mark.parametrize("case", [Case(("down",)), Case(()), Case(ALL_FUSED, FUSED)])
def test_the_backward_goes_through_every_weight_where_the_input_wants_its_gradient(case: Case) -> None:
    assert used_backward(case, below=True).found == {n for names in case.groups for n in names}
