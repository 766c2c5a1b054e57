"""What a base is loaded as for serving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from twofold.base import load
from twofold.recipes.serve import ServeConfig, load_served

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture(autouse=True)
def _multiplies_float32_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "fastest_dtype", lambda device: torch.float32)


def test_our_kernels_decode_bfloat16_also_where_float32_multiplies_faster(wide_base: Path) -> None:
    served = load_served(ServeConfig(base=str(wide_base)))
    assert served.scheduler.path.startswith("our own kernels")
    found = served.base.model.state_dict() | dict(served.base.model.named_buffers())
    expected = load.load_base(str(wide_base), "bfloat16").model
    for name, tensor in (expected.state_dict() | dict(expected.named_buffers())).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_what_pytorch_decodes_stays_in_the_faster_type(gpt2_base: Path) -> None:
    served = load_served(ServeConfig(base=str(gpt2_base)))
    assert served.base.dtype == torch.float32


def test_a_type_that_is_asked_for_is_kept(wide_base: Path) -> None:
    served = load_served(ServeConfig(base=str(wide_base), dtype="float32"))
    assert served.base.dtype == torch.float32


def test_our_kernels_decode_a_packed_base_in_the_type_it_was_packed_in(wide_base: Path) -> None:
    served = load_served(ServeConfig(base=str(wide_base), quantization="int8"))
    assert served.scheduler.path.startswith("our own kernels")
    assert served.base.dtype == torch.float32
