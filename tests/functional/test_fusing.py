"""Compiled kernels compute what the functions they are made from compute; without a compiler there is one clear sentence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twofold.errors import ConfigError
from twofold.functional.fusing import fused_kernels, fusible
from twofold.functional.gated import ACTIVATIONS, gated, gated_backward
from twofold.functional.loss import head_loss
from twofold.functional.norm import Norm, normed, reciprocal_rms, rms_norm_backward
from twofold.functional.rope import Angles, rotate

CPU = torch.device("cpu")


def values(rows: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Everything that is fusible, on rows drawn from one seed."""
    torch.manual_seed(rows)
    x, dy, gate, up = (torch.randn(rows, 64).to(dtype) for _ in range(4))
    norm = Norm(torch.randn(64).to(dtype), 1e-5)
    rho = reciprocal_rms(x, norm)
    angles = Angles.of(*(torch.randn(rows, 16).to(dtype) for _ in range(2)))
    silu = ACTIVATIONS["silu"]
    hidden = x.clone().requires_grad_()
    loss = head_loss(hidden, torch.randn(96, 64).to(dtype), torch.randint(0, 96, (rows,))).loss_sum
    loss.backward()
    return [
        *(rho, normed(x, rho, norm), rms_norm_backward(dy, x, rho, norm), rotate(x.view(rows, 4, 16), angles)),
        *(gated(gate, up, silu), *gated_backward(dy, gate, up, silu)),
        *(loss.detach(), hidden.grad),
    ]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_compiled_kernels_compute_the_same_for_any_number_of_rows(dtype: str) -> None:
    """In a process of its own, for torch.compile cannot look through the checks of shapes that these tests run under."""
    subprocess.run([sys.executable, __file__, dtype], check=True)


def compare(dtype: str) -> None:
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for rows in (24, 40, 56):
        plain = values(rows, getattr(torch, dtype))
        with fused_kernels(CPU):
            compiled = values(rows, getattr(torch, dtype))
        for a, b in zip(compiled, plain, strict=True):
            assert b is not None
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_functions_are_compiled_within_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def watch(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", watch)
    double = fusible(lambda x: 2 * x)
    double(torch.ones(1))
    assert not compiled
    with fused_kernels(CPU):
        double(torch.ones(1))
    assert compiled == ["neg", "<lambda>"]


def test_a_machine_without_a_compiler_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with (
        pytest.raises(
            ConfigError, match=r"torch\.compile makes no kernels for cpu here.*set training\.compile to false"
        ),
        fused_kernels(CPU),
    ):
        pass


if __name__ == "__main__":
    compare(sys.argv[1])
