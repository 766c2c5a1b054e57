"""Widening one operation at a time against the plain way: to convert the whole model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, build_model, inputs, randomise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from twofold.adapter.attach import attach, folding, merge, unmerge
from twofold.adapter.config import LoraConfig
from twofold.functional import widen
from twofold.functional.widen import Widened, move_buffers
from twofold.layers.protocol import AdapterLayer
from twofold.recipes.proof import WIDER

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def adapted(family: str, dtype: torch.dtype) -> Any:
    """A model whose adapter, embeddings and head included, says something."""
    model = build_model(family).to(dtype)
    attach(model, LoraConfig(r=2, target_modules="all-linear"))
    randomise((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return model


def converted(model: Any, dtype: torch.dtype) -> Any:
    """The oracle: a copy with every parameter, and every merged weight, in the wider type."""
    whole = copy.deepcopy(model)
    for parameter in whole.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, dtype))
    for module in whole.modules():
        if isinstance(module, AdapterLayer) and getattr(module, "merged", None) is not None:
            module.merged = module.merged.to(dtype)
    return whole


@torch.no_grad()
def said(model: Any) -> Tensor:
    found: Tensor = model(**inputs(model)).logits
    return found


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_it_says_when_converted_whole(family: str, dtype: torch.dtype) -> None:
    model, wide = adapted(family, dtype), WIDER[dtype]
    expected = said(converted(model, wide))
    with Widened(wide, CPU):
        found = said(model)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 if wide is torch.float64 else 1e-5)
    assert not torch.equal(found, said(model).to(wide))


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_folded_for_one_pass_is_the_merged_one_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    """Inside of widening too, where it must be rounded as if it were stored."""
    model, wide = adapted(family, dtype), WIDER[dtype]
    merge(model)
    merged, merged_wide = said(model), said(converted(model, wide))
    unmerge(model)
    apart = said(model)
    with folding(model):
        assert torch.equal(said(model), merged)
        with Widened(wide, CPU):
            torch.testing.assert_close(said(model), merged_wide, rtol=1e-12, atol=1e-12 if dtype.itemsize > 2 else 1e-5)
    assert torch.equal(said(model), apart)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma", "t5"])
def test_large_maps_go_through_in_slices(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(family, torch.float32)
    expected = said(converted(model, torch.float64))
    monkeypatch.setattr(widen, "WIDE_ELEMENTS", 7 * 32)
    with Widened(torch.float64, CPU):
        torch.testing.assert_close(said(model), expected, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most values of one type in a tensor that any operation makes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.elements = dtype, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.dtype == self.dtype:
            self.elements = max(self.elements, found.numel())
        return found


def test_no_table_or_head_is_ever_widened_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama-tied")
    model.resize_token_embeddings(5000)
    monkeypatch.setattr(widen, "WIDE_ELEMENTS", 32 * 64)
    with Largest(torch.float64) as seen, Widened(torch.float64, CPU), torch.no_grad():
        model(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert seen.elements == 2 * 5000  # the logits; the table has 160,000


class Awkward(nn.Module):
    """A packed integer weight comes first, one weight is read by its parent, and code asks another for its type."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.tensor([1, 2, 3], dtype=torch.uint8), requires_grad=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.7))
        self.register_buffer("shift", torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.out.weight.dtype) * self.packed.sum()
        y, _ = self.attention(x, x, x)
        return torch.cat([y @ self.out.weight.T, self.out.bias.expand_as(y)]) * self.scale + self.shift


def test_weights_are_reached_without_a_call_of_their_module() -> None:
    torch.manual_seed(0)
    model, x = Awkward().eval(), torch.randn(1, 3, 8)
    whole = copy.deepcopy(model)
    for parameter in whole.parameters():
        parameter.data = parameter.data.double() if parameter.is_floating_point() else parameter.data
    with torch.no_grad(), Widened(torch.float64, CPU):
        found = model(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, whole(x).detach(), rtol=1e-13, atol=1e-13)


def test_an_exception_within_leaves_everything_as_it_was() -> None:
    model = adapted("llama", torch.float32)
    before, places = said(model), [p.data_ptr() for p in model.parameters()]
    model.model.norm.register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError), Widened(torch.float64, CPU), folding(model):
        said(model)
    model.model.norm._forward_hooks.clear()
    assert [p.data_ptr() for p in model.parameters()] == places
    assert torch.equal(said(model), before)


@DTYPES
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "opt"])
def test_a_model_on_the_cpu_runs_on_a_gpu_weight_by_weight(family: str, dtype: torch.dtype) -> None:
    """As a proof runs a merged folder, which stays mapped from its files; on a GPU that is not there (see test_fake_cuda)."""
    gpu = torch.device("cuda:0" if torch.backends.cuda.is_built() else "lazy:0")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(), torch.no_grad():
            model = build_model(family)
            move_buffers(model, gpu)
            ids = torch.empty(2, 5, dtype=torch.int64, device=gpu)
            with Widened(WIDER[dtype], gpu):
                found = model(input_ids=ids).logits
    finally:
        torch.set_default_dtype(before)
    assert (found.device, found.dtype) == (gpu, WIDER[dtype])
