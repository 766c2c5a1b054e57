"""The kernels of a training step: against the same formulas in float64, and a whole step of every family with and without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import DESCRIBED, build_model, randomise
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.base.batch import Example, PackedBatch, pack
from twofold.base.blocks import Decoder, describe
from twofold.base.load import DEFAULT_BASE, load_base
from twofold.functional import gated, loss, norm, rope
from twofold.functional.gated import ACTIVATIONS
from twofold.functional.norm import Norm
from twofold.functional.rope import Angles
from twofold.lowrank.products import Term, crossed, sum_of_products
from twofold.native import training
from twofold.native.build import NotBuilt
from twofold.native.training import KERNELS, native_kernels, why_not
from twofold.replaceable import original
from twofold.training.objective import FastObjective

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", TYPES, ids=["float32", "bfloat16"])
pytestmark = pytest.mark.skipif(
    any(why_not(d, CPU) for d in TYPES), reason=f"no kernels here: {[why_not(d, CPU) for d in TYPES]}"
)


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).to(dtype)


def near(found: Tensor, expected: Tensor) -> None:
    """Within the rounding of a sum in float32, and of the result."""
    assert found.shape == expected.shape
    tolerance = float(expected.abs().max()) * (3e-6 if found.dtype == torch.float32 else 5e-3)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("rows", [1, 11, 12, 13, 40, 97])
@pytest.mark.parametrize(("out", "in_", "rank"), [(64, 32, 16), (40, 64, 4), (17, 18, 2), (8, 1300, 8)])
@pytest.mark.usefixtures("only_kernels")
def test_a_sum_of_products(dtype: torch.dtype, rows: int, out: int, in_: int, rank: int) -> None:
    x, w, h, b, bias = (drawn(dtype, *s) for s in ((rows, in_), (out, in_), (rows, rank + 3), (out, rank), (out,)))
    part, onto = h[:, 2 : 2 + rank], drawn(dtype, rows, out + 3)[:, :out]
    with native_kernels():
        near(sum_of_products([Term(x, w)], bias, onto), x.double() @ w.double().T + bias.double() + onto.double())
        near(sum_of_products([Term(x, w)]), x.double() @ w.double().T)
        near(
            sum_of_products([Term(x, w), Term(part, b, scale=0.3)], bias),
            x.double() @ w.double().T + 0.3 * part.double() @ b.double().T + bias.double(),
        ) if dtype == torch.float32 else None
        near(
            sum_of_products([Term(x, w), Term(part, b, scale=2.0)], bias),
            x.double() @ w.double().T + 2 * part.double() @ b.double().T + bias.double(),
        )


@DTYPES
@pytest.mark.parametrize("rows", [1, 13, 608])
@pytest.mark.usefixtures("only_kernels")
def test_a_sum_over_weights_as_they_are_read(dtype: torch.dtype, rows: int) -> None:
    first, second, g = drawn(dtype, rows, 96), drawn(dtype, rows, 40), drawn(dtype, rows, 8)
    w, v, a = drawn(dtype, 96, 70), drawn(dtype, 40, 70), drawn(dtype, 8, 70)
    with native_kernels():
        found = sum_of_products([Term(first, w, as_read=True), Term(second, v, as_read=True), Term(g, a, as_read=True)])
    near(found, first.double() @ w.double() + second.double() @ v.double() + g.double() @ a.double())


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 65, 1200])
@pytest.mark.parametrize("ranks", [3, 16, 96])
@pytest.mark.usefixtures("only_kernels")
def test_the_gradient_of_a_factor_is_in_float32(dtype: torch.dtype, rows: int, ranks: int) -> None:
    h, dy = drawn(dtype, rows, ranks + 8)[:, 4 : 4 + ranks], drawn(dtype, rows, 50)
    with native_kernels():
        of_a, of_b = crossed(h, dy, 2.0), crossed(dy, h, 2.0)
    assert of_a.dtype == of_b.dtype == torch.float32
    near(of_a, 2 * h.double().T @ dy.double())
    near(of_b, 2 * dy.double().T @ h.double())


def test_without_kernels_a_head_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_built(_: str) -> None:
        raise NotBuilt("there is no C++ compiler")

    monkeypatch.setattr(training, "library", not_built)
    monkeypatch.setattr(training, "_kernels", training._kernels.__wrapped__)
    hidden, head = drawn(torch.bfloat16, 32, 48), drawn(torch.bfloat16, 100, 48)
    with native_kernels():
        found = loss.logits_of(hidden, head), loss.hidden_gradient(hidden @ head.T, head)
    assert torch.equal(found[0], hidden @ head.T)
    assert torch.equal(found[1], hidden @ head.T @ head)


def in_double(run: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives in float64."""

    def wide(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.double()
        return type(x)(*(wide(v) for v in x)) if isinstance(x, Norm | Angles) else x

    return original(run)(*(wide(a) for a in arguments))


def check(run: Callable[..., Any], *arguments: Any) -> None:
    """A function's kernel against the function in float64."""
    expected = in_double(run, *arguments)
    with native_kernels():
        found = run(*(a.clone() if isinstance(a, Tensor) and a.is_contiguous() else a for a in arguments))
    for one, wide in zip(*((f,) if isinstance(f, Tensor) else tuple(f) for f in (found, expected)), strict=True):
        near(one, wide)


@DTYPES
def test_a_head_and_its_gradient(dtype: torch.dtype) -> None:
    hidden, head, dlogits = drawn(dtype, 32, 48), drawn(dtype, 1000, 48), drawn(dtype, 32, 1000)
    with native_kernels():
        near(loss.logits_of(hidden, head), hidden.double() @ head.double().T)
        near(loss.hidden_gradient(dlogits, head), dlogits.double() @ head.double())


@DTYPES
@pytest.mark.parametrize("width", [64, 576, 50])
@pytest.mark.parametrize("wide", [True, False], ids=["weight in float32", "weight in its type"])
@pytest.mark.usefixtures("only_kernels")
def test_norms_and_their_gradient(dtype: torch.dtype, width: int, wide: bool) -> None:
    x, dy = 3 * drawn(dtype, 21, width), drawn(dtype, 21, width)
    of = Norm(drawn(torch.float32 if wide else dtype, width), 1e-5)
    rho = in_double(norm.reciprocal_rms, x, of).float()
    with native_kernels():
        torch.testing.assert_close(norm.reciprocal_rms(x, of), rho, rtol=2e-6, atol=0)
    check(norm.normed, x, rho, of)
    check(norm.rms_norm_backward, dy, x, rho, of)
    check(norm.rms_norm_backward, dy, x, rho, of, drawn(dtype, 21, width))


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("only_kernels")
def test_gated_activations_and_their_gradient(dtype: torch.dtype, activation: str) -> None:
    both, dy, f = 8 * drawn(dtype, 9, 2 * 70), drawn(dtype, 9, 70), ACTIVATIONS[activation]
    both[0, 0], both[0, 1] = 300, -300
    check(gated.gated, *both.chunk(2, -1), f)
    check(gated.gated_backward, dy, *both.chunk(2, -1), f)


@DTYPES
@pytest.mark.parametrize("turned", [64, 32])
@pytest.mark.usefixtures("only_kernels")
def test_rotation_and_its_gradient(dtype: torch.dtype, turned: int) -> None:
    x = drawn(dtype, 9, 6 * 64)[:, 64:].view(9, 5, 64)
    angles = Angles.of(drawn(dtype, 9, turned), drawn(dtype, 9, turned))
    check(rope.rotate, x, angles)
    check(rope.rotate, x, angles.back())


@DTYPES
@pytest.mark.parametrize("vocabulary", [96, 1001])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.usefixtures("only_kernels")
def test_the_loss_of_a_chunk_and_its_gradient(dtype: torch.dtype, vocabulary: int, gradient: bool) -> None:
    logits, labels = 6 * drawn(dtype, 30, vocabulary), torch.randint(0, vocabulary, (30,))
    labels[:10] = logits[:10].argmax(-1)
    ours, wide = logits.clone(), logits.double()
    expected = original(loss.chunk_loss)(wide, labels, None, gradient=gradient)
    with native_kernels():
        found = loss.chunk_loss(ours, labels, None, gradient=gradient)
    torch.testing.assert_close(found.loss_sum.double(), expected.loss_sum, rtol=1e-6, atol=0)
    assert int(found.correct) == int(expected.correct) >= 10
    if gradient:
        near(ours, wide)
    else:
        assert torch.equal(ours, logits)


def test_what_they_are_not_for_is_left_to_pytorch() -> None:
    x, w = torch.randn(5, 7), torch.randn(6, 7)
    strided = torch.randn(14, 6).T[:, ::2]
    with native_kernels():
        for a, b in ((x, w), (x.double(), w.double()), (x.half(), w.half()), (x, strided)):
            assert torch.equal(sum_of_products([Term(a, b)]), torch.nn.functional.linear(a, b))
        with FakeTensorMode():
            on_gpu = sum_of_products([Term(torch.empty(4, 8, device="cuda"), torch.empty(6, 8, device="cuda"))])
    assert on_gpu.device.type == "cuda"
    assert on_gpu.shape == (4, 6)


# ---------------------------------------------------------------------------------------- whole steps


def a_batch(vocabulary: int, *lengths: int) -> PackedBatch:
    draw = torch.Generator().manual_seed(3)
    beginning = torch.randint(4, vocabulary, (9,), generator=draw).tolist()
    texts = [[*beginning, *torch.randint(4, vocabulary, (n,), generator=draw).tolist()] for n in lengths]
    return pack([Example(t, [i > 4 for i in range(len(t))]) for t in texts])


def adapted(model: Any) -> FastObjective:
    attach(model, LoraConfig(r=4, lora_alpha=8))
    randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad], scale=0.1)
    described = describe(model.train())
    assert isinstance(described, Decoder)
    return FastObjective(described, recompute=False)


def step(model: Any, objective: FastObjective, batch: PackedBatch) -> tuple[Tensor, list[Tensor]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = objective(batch).loss_sum
    return found.detach(), list(torch.autograd.grad(found, parameters))


@pytest.mark.parametrize("family", DESCRIBED)
def test_a_step_of_every_family_has_the_same_loss_and_gradients(family: str) -> None:
    model = build_model(family)
    objective, batch = adapted(model), a_batch(model.config.vocab_size, 12, 3, 17)
    expected, gradients = step(model, objective, batch)
    with native_kernels():
        found, ours = step(model, objective, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for a, b in zip(ours, gradients, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.usefixtures("only_kernels")
def test_of_the_real_model_every_operation_runs_on_them_and_bfloat16_is_nearer_the_truth() -> None:
    """Than with PyTorch's operations, which round between a base's product and its update, and gradients once more."""
    wide = load_base(DEFAULT_BASE, "float32", "cpu").model
    batch = a_batch(wide.config.vocab_size, 16, 11)
    torch.manual_seed(0)
    objective = adapted(wide)
    with native_kernels():
        _, truth = step(wide, objective, batch)
    narrow = load_base(DEFAULT_BASE, "bfloat16", "cpu").model
    torch.manual_seed(0)
    objective = adapted(narrow)
    _, plain = step(narrow, objective, batch)
    with native_kernels():
        _, ours = step(narrow, objective, batch)
    distances = [sum(float((a - t).norm() / t.norm()) for a, t in zip(g, truth, strict=True)) for g in (ours, plain)]
    assert distances[0] < distances[1]


def test_every_kernel_stands_for_a_function_that_can_be_replaced() -> None:
    assert all(callable(original(run)) for run in KERNELS)
