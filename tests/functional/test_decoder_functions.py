"""Norm, rotation, gate and loss with hand-written gradients: against float64 formulas and transformers' own modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, Phi3Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb

from twofold.functional import loss as loss_module
from twofold.functional.gated import ACTIVATIONS, gated, gated_backward
from twofold.functional.loss import chunk_rows, head_loss, logits_loss
from twofold.functional.norm import Norm, reciprocal_rms, rms_norm, rms_norm_backward, rms_norm_forward
from twofold.functional.rope import Angles, rotate


def doubles(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def same_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float = 1e-10) -> None:
    """Equal values, and equal gradients of a random weighting of them."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------- norm

NORM_TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
"""Of a value, against transformers' modules, which sum the squares in another order: that changes the last bit of the root, which
in bfloat16 rounds to another neighbour now and then."""


def test_rms_norm_gradcheck_and_formula() -> None:
    x, norm = doubles(4, 6), Norm(doubles(6, grad=False), 1e-5)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, norm), (x,))
    same_gradients(rms_norm(x, norm), x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight, [x])


@pytest.mark.parametrize("dtype", NORM_TOLERANCES, ids=str)
@pytest.mark.parametrize("form", [LlamaRMSNorm, GemmaRMSNorm])
def test_rms_norm_is_that_of_transformers(form: type[Any], dtype: torch.dtype) -> None:
    """Llama rounds before it multiplies by the weight; Gemma after, by a weight that is written as its difference from one."""
    module = form(64, eps=1e-5).to(dtype)
    module.weight.data.normal_()
    module.weight.requires_grad_(False)
    norm = Norm(module.weight if form is LlamaRMSNorm else 1 + module.weight.float(), 1e-5)
    x = (3 * torch.randn(90, 64)).to(dtype).requires_grad_()
    found, expected = rms_norm(x, norm), module(x)
    assert found.dtype is dtype
    torch.testing.assert_close(found, expected, rtol=NORM_TOLERANCES[dtype], atol=NORM_TOLERANCES[dtype] / 1000)
    if dtype is torch.bfloat16:
        assert (found != expected).double().mean() < 0.01
    ours, theirs = (torch.autograd.grad(y.float().square().sum(), x)[0].float() for y in (found, expected))
    assert (ours - theirs).norm() < (1e-5 if dtype is torch.float32 else 2e-2) * theirs.norm()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["Gemma", "Llama"])
def test_rms_norm_of_bfloat16_is_near_the_truth_and_leaves_its_input_alone(weight_dtype: torch.dtype) -> None:
    x, weight = torch.randn(20, 48).bfloat16(), torch.randn(48).to(weight_dtype)
    before, dy = x.clone(), torch.randn(20, 48).bfloat16()
    wide = x.double().requires_grad_()
    y = rms_norm(wide, Norm(weight.double(), 1e-6))
    y.backward(dy.double())
    norm = Norm(weight, 1e-6)
    for found, right in (
        (rms_norm_forward(x, norm), y),
        (rms_norm_backward(dy, x, reciprocal_rms(x, norm), norm), wide.grad),
    ):
        assert right is not None
        assert found.dtype is torch.bfloat16
        assert (found.double() - right).norm() < 0.005 * right.norm()
    assert torch.equal(x, before)


def test_rms_norm_of_a_zero_row_is_zero_and_differentiable() -> None:
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    y = rms_norm(x, Norm(torch.ones(4, dtype=torch.float64), 1e-6))
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


# ---------------------------------------------------------------------------------------- rotation

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 17]])


def turned_by(cos: Tensor, sin: Tensor, x: Tensor, y: Tensor) -> None:
    """`rotate` and its way back are transformers' rotation `y` of x (rows, heads, d), and its gradient."""
    angles = Angles.of(cos[0].double(), sin[0].double())
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles), (x,))
    found, dy = rotate(x, angles), torch.randn_like(x)
    torch.testing.assert_close(rotate(dy, angles.back()), torch.autograd.grad(y, x, dy, retain_graph=True)[0])
    torch.testing.assert_close(rotate(found, angles.back()), x)
    same_gradients(found, y, [x])


def test_rotation_is_that_of_transformers() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64)
    x = doubles(6, 4, 8)
    cos, sin = LlamaRotaryEmbedding(config)(x, POSITIONS)
    by_head = x.transpose(0, 1)[None]
    turned_by(cos, sin, x, apply_rotary_pos_emb(by_head, by_head, cos, sin)[0][0].transpose(0, 1))


def test_partial_rotation_is_that_of_transformers() -> None:
    turning = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = Phi3Config(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=64, rope_parameters=turning, pad_token_id=0
    )
    x = doubles(6, 4, 8)
    cos, sin = Phi3RotaryEmbedding(config)(x, POSITIONS)
    assert cos.shape[-1] == 4
    by_head = x.transpose(0, 1)[None]
    turned_by(cos, sin, x, apply_partial_rotary_pos_emb(by_head, by_head, cos, sin)[0][0].transpose(0, 1))


def test_no_angles_leave_everything_as_it_is() -> None:
    x, nothing = doubles(6, 4, 8, grad=False), torch.zeros(6, 0, dtype=torch.float64)
    assert torch.equal(rotate(x, Angles.of(nothing, nothing)), x)


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    angles = torch.arange(12, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    both = torch.cat([angles, angles], 1)
    turn = Angles.of(both.cos(), both.sin())
    q, k = doubles(1, 1, 6, grad=False).expand(12, 1, 6), doubles(1, 1, 6, grad=False).expand(12, 1, 6)
    turned_q, turned_k = rotate(q, turn), rotate(k, turn)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    products = torch.einsum("ihd,jhd->ij", turned_q, turned_k)
    for distance in range(11):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


# ---------------------------------------------------------------------------------------- gate

FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def test_every_activation_has_its_formula_here() -> None:
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradient_follow_the_formula(name: str) -> None:
    gate, up, dy = doubles(5, 7), doubles(5, 7), doubles(5, 7, grad=False)
    f = ACTIVATIONS[name]
    expected = FORMULAS[name](gate) * up
    before = gate.detach().clone(), up.detach().clone(), dy.clone()
    with torch.no_grad():
        torch.testing.assert_close(gated(gate, up, f), expected.detach())
        found = gated_backward(dy, gate, up, f)
    for a, b in zip(found, torch.autograd.grad(expected, (gate, up), dy), strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(now.detach(), then) for now, then in zip((gate, up, dy), before, strict=True))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_bfloat16_are_near_the_truth(name: str) -> None:
    gate, up, dy = (torch.randn(20, 30).bfloat16() for _ in range(3))
    wide = [t.double().requires_grad_() for t in (gate, up)]
    y = FORMULAS[name](wide[0]) * wide[1]
    right = [y, *torch.autograd.grad(y, wide, dy.double())]
    f = ACTIVATIONS[name]
    found = [gated(gate, up, f), *gated_backward(dy, gate, up, f)]
    for a, b in zip(found, right, strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()


# ---------------------------------------------------------------------------------------- loss


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("softcap", [None, 0.7, 30.0])
def test_head_loss_gradcheck_and_cross_entropy(softcap: float | None) -> None:
    hidden, head, labels = doubles(6, 5), doubles(11, 5, grad=False), torch.tensor([0, 10, 3, 3, 7, 1])
    assert torch.autograd.gradcheck(lambda h: head_loss(h, head, labels, softcap).loss_sum, (hidden,))
    logits = capped(hidden @ head.T, softcap)
    found = head_loss(hidden, head, labels, softcap)
    same_gradients(found.loss_sum, F.cross_entropy(logits, labels, reduction="sum"), [hidden])
    assert int(found.correct) == int((logits.argmax(-1) == labels).sum())


@given(
    rows=st.integers(1, 70),
    chunk=st.integers(1, 80),
    slices=st.integers(1, 80),
    seed=st.integers(0, 99),
    softcap=st.sampled_from([None, 1.3]),
)
def test_loss_and_gradient_do_not_depend_on_chunks_and_slices(
    rows: int, chunk: int, slices: int, seed: int, softcap: float | None
) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 5, generator=g, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 5, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 11, (rows,), generator=g)
    expected = F.cross_entropy(capped(hidden @ head.T, softcap), labels, reduction="sum")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_ELEMENTS", 11 * chunk)
        patch.setattr(loss_module, "SLICE_ELEMENTS", 11 * slices)
        found = head_loss(hidden, head, labels, softcap)
    same_gradients(found.loss_sum, expected, [hidden])


def test_head_and_logits_losses_agree_and_scale_with_their_gradient() -> None:
    hidden, head, labels = doubles(6, 5), doubles(11, 5, grad=False), torch.tensor([0, 10, 3, 3, 7, 1])
    ours, plain = head_loss(hidden, head, labels), logits_loss(hidden @ head.T, labels)
    assert ours.correct == plain.correct
    same_gradients(ours.loss_sum / 3, plain.loss_sum / 3, [hidden])


def test_huge_logits_do_not_overflow() -> None:
    hidden, head = torch.tensor([[300.0, 0.0]], requires_grad=True), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    right, wrong = head_loss(hidden, head, torch.tensor([0])), head_loss(hidden, head, torch.tensor([2]))
    assert float(right.loss_sum.detach()) == 0.0
    assert float(wrong.loss_sum.detach()) == pytest.approx(600.0)
    wrong.loss_sum.backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[2.0, 0.0]]


@given(rows=st.integers(1, 10**6), vocabulary=st.integers(1, 300_000))
def test_chunks_are_alike_and_none_is_too_large(rows: int, vocabulary: int) -> None:
    size, least = chunk_rows(rows, vocabulary), loss_module.ROW_MULTIPLE
    assert size % least == 0
    chunks = -(-rows // size)
    assert (size - least) * vocabulary < loss_module.CHUNK_ELEMENTS, "larger only by the rounding"
    assert chunks * (size - least) < rows, "as many rows in the last one, but for the rounding"


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_bfloat16_loss_is_summed_in_float32_and_without_gradient_where_none_is_needed(softcap: float | None) -> None:
    hidden, head, labels = torch.randn(200, 16), torch.randn(50, 16), torch.randint(0, 50, (200,))
    low = hidden.bfloat16().requires_grad_()
    found = head_loss(low, head.bfloat16(), labels, softcap)
    wide = low.detach().double().requires_grad_()
    expected = F.cross_entropy(capped(wide @ head.bfloat16().double().T, softcap), labels, reduction="sum")
    assert found.loss_sum.dtype is torch.float32
    torch.testing.assert_close(found.loss_sum.double(), expected, rtol=5e-3, atol=0)
    found.loss_sum.backward()
    expected.backward()
    assert low.grad is not None
    assert wide.grad is not None
    assert (low.grad.double() - wide.grad).norm() < 0.02 * wide.grad.norm()
    assert not head_loss(hidden, head, labels, softcap).loss_sum.requires_grad
