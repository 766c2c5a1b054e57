"""Norm, rotation, gate and loss with hand-written gradients: against float64 formulas and transformers' own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from twofold.functional import loss as loss_module
from twofold.functional.loss import head_loss, logits_loss
from twofold.functional.norm import rms_norm
from twofold.functional.rope import rope
from twofold.functional.swiglu import swiglu


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


def test_rms_norm_gradcheck_and_formula() -> None:
    x, weight = doubles(4, 6), doubles(6, grad=False)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (x,))
    same_gradients(rms_norm(x, weight, 1e-5), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight, [x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(32, eps=1e-5).to(dtype)
    module.weight.data.normal_()
    module.weight.requires_grad_(False)
    x = torch.randn(9, 32).to(dtype).requires_grad_()
    found, expected = rms_norm(x, module.weight, 1e-5), module(x)
    assert torch.equal(found, expected)
    ours, theirs = (torch.autograd.grad(y.float().square().sum(), x)[0].float() for y in (found, expected))
    assert (ours - theirs).norm() < (1e-5 if dtype is torch.float32 else 2e-2) * theirs.norm()


def test_rms_norm_of_a_zero_row_is_zero_and_differentiable() -> None:
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    y = rms_norm(x, torch.ones(4, dtype=torch.float64), 1e-6)
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


# ---------------------------------------------------------------------------------------- rotation


def test_rope_gradcheck_and_that_of_transformers() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64)
    positions = torch.tensor([0, 1, 2, 0, 1, 17])
    cos, sin = LlamaRotaryEmbedding(config)(doubles(1, 6, 8), positions[None])
    x = doubles(6, 4, 8)
    half_cos, half_sin = cos[0, :, :4].double(), sin[0, :, :4].double()
    assert torch.autograd.gradcheck(lambda x: rope(x, half_cos, half_sin), (x,))
    expected = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)[0][0].transpose(0, 1)
    same_gradients(rope(x, half_cos, half_sin), expected, [x])


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    angles = torch.arange(12, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    q, k = doubles(1, 1, 6, grad=False).expand(12, 1, 6), doubles(1, 1, 6, grad=False).expand(12, 1, 6)
    turned_q, turned_k = rope(q, angles.cos(), angles.sin()), rope(k, angles.cos(), angles.sin())
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    products = torch.einsum("ihd,jhd->ij", turned_q, turned_k)
    for distance in range(11):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


# ---------------------------------------------------------------------------------------- gate


def test_swiglu_gradcheck_and_formula() -> None:
    gate, up = doubles(5, 7), doubles(5, 7)
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    same_gradients(swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up, [gate, up])


def test_swiglu_keeps_its_inputs_as_they_are() -> None:
    gate, up = doubles(5, 7), doubles(5, 7)
    before = gate.detach().clone(), up.detach().clone()
    swiglu(gate, up).sum().backward()
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])


def test_swiglu_in_bfloat16_is_near_the_truth() -> None:
    gate, up = (torch.randn(20, 30).bfloat16().requires_grad_() for _ in range(2))
    y = swiglu(gate, up)
    y.float().square().sum().backward()
    wide_gate, wide_up = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    z = F.silu(wide_gate) * wide_up
    z.square().sum().backward()
    for found, right in ((y, z), (gate.grad, wide_gate.grad), (up.grad, wide_up.grad)):
        assert found is not None
        assert right is not None
        assert (found.double() - right).norm() < 0.02 * right.norm()


# ---------------------------------------------------------------------------------------- loss


def test_head_loss_gradcheck_and_cross_entropy() -> None:
    hidden, head, labels = doubles(6, 5), doubles(11, 5, grad=False), torch.tensor([0, 10, 3, 3, 7, 1])
    assert torch.autograd.gradcheck(lambda h: head_loss(h, head, labels).loss_sum, (hidden,))
    logits = hidden @ head.T
    found = head_loss(hidden, head, labels)
    same_gradients(found.loss_sum, F.cross_entropy(logits, labels, reduction="sum"), [hidden])
    assert int(found.correct) == int((logits.argmax(-1) == labels).sum())


@given(rows=st.integers(1, 23), chunk=st.integers(1, 30), seed=st.integers(0, 99))
def test_loss_and_gradient_do_not_depend_on_the_chunk(rows: int, chunk: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 5, generator=g, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 5, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 11, (rows,), generator=g)
    expected = F.cross_entropy(hidden @ head.T, labels, reduction="sum")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_ELEMENTS", 11 * chunk)
        found = head_loss(hidden, head, labels)
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


def test_bfloat16_loss_is_summed_in_float32_and_without_gradient_where_none_is_needed() -> None:
    hidden, head, labels = torch.randn(200, 16), torch.randn(50, 16), torch.randint(0, 50, (200,))
    low = hidden.bfloat16().requires_grad_()
    found = head_loss(low, head.bfloat16(), labels)
    wide = low.detach().double().requires_grad_()
    expected = F.cross_entropy(wide @ head.bfloat16().double().T, labels, reduction="sum")
    assert found.loss_sum.dtype is torch.float32
    torch.testing.assert_close(found.loss_sum.double(), expected, rtol=5e-3, atol=0)
    found.loss_sum.backward()
    expected.backward()
    assert low.grad is not None
    assert wide.grad is not None
    assert (low.grad.double() - wide.grad).norm() < 0.02 * wide.grad.norm()
    assert not head_loss(hidden, head, labels).loss_sum.requires_grad
