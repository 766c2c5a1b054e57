"""Known shapes against the numbers of parameters that their makers publish (the hub's safetensors counts)."""

from __future__ import annotations

import pytest

from twofold.base.known_shapes import KNOWN_SHAPES
from twofold.base.load import load_base
from twofold.base.shapes import meta_model
from twofold.errors import BaseError

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_248_023_552,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
}


def test_every_shape_has_a_published_count() -> None:
    assert set(PUBLISHED) == set(KNOWN_SHAPES)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_a_shape_has_the_published_number_of_parameters(name: str, count: int) -> None:
    assert sum(p.numel() for p in meta_model(name).parameters()) == count


def test_a_shape_has_no_weights_to_load() -> None:
    with pytest.raises(BaseError, match=r"only the shape of llama-3\.1-8b is known"):
        load_base("llama-3.1-8b")


def test_a_hub_id_out_of_reach_is_one_sentence_that_names_the_shape() -> None:
    with pytest.raises(BaseError, match=r"hub cannot be reached.*did you mean 'llama-3.1-8b'"):
        meta_model("meta-llama/Llama-3.1-8B")
