"""What `combine` refuses: adapters that do not add up, of other bases, damaged, or by settings that make no sense."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_model
from safetensors.torch import load_file, save_file
from tiny_adapters import saved, with_tensors

import twofold
from twofold.adapter.files import Provenance
from twofold.base.fingerprint import fingerprint
from twofold.errors import AdapterFileError, ConfigError, ForeignBaseError, RunError
from twofold.merging.extract import Extraction
from twofold.merging.resize import Size
from twofold.recipes.adapters import parse_adapter
from twofold.recipes.export import export_adapter
from twofold.recipes.extract import extract
from twofold.recipes.inspect import compare, inspect_adapter
from twofold.recipes.resize import resize


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"use_dora": True}, {}, "is DoRA, which sets the lengths"),
        ({"modules_to_save": ["o_proj"], "target_modules": ["q_proj"]}, {"target_modules": ["o_proj"]}, "trained whole by another"),
        ({"trainable_token_indices": [5]}, {"trainable_token_indices": [6]}, "train different tokens"),
        ({"trainable_token_indices": [5]}, {"target_modules": ["embed_tokens"]}, "has factors in one adapter and tokens"),
        ({"trainable_token_indices": [5]}, {"modules_to_save": ["embed_tokens"]}, "whole by one .* single tokens by another"),
        ({"lora_bias": True}, {"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is no linear layer.*lora_bias"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_refused(
    first: dict[str, Any], second: dict[str, Any], said: str, tmp_path: Path
) -> None:
    given = {saved(tmp_path, r=2, **first): 1.0, saved(tmp_path, r=2, seed=2, **second): 1.0}
    with pytest.raises(ConfigError, match=said):
        twofold.combine(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_that_no_generator_takes_is_refused(seed: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"seed is {seed} but must be at least 0 and below"):
        twofold.combine({saved(tmp_path, r=2): 1.0}, tmp_path / "out", method="dare_linear", seed=seed)
    with pytest.raises(ConfigError, match=f"seed is {seed} but must be at least 0 and below"):
        extract("tiny", "tuned", tmp_path / "out", Extraction(r=2), seed=seed)


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_deltas_beyond_float32_are_refused(method: str, tmp_path: Path) -> None:
    huge = saved(tmp_path, r=2, target_modules=["q_proj"])
    file = huge / "adapter_model.safetensors"
    save_file({key: value * 1e25 for key, value in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match="values that float32 cannot hold"):
        twofold.combine({huge: 1.0}, tmp_path / "out", method=method, density=0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["combine", "resize", "compare", "kohya", "vllm"])
def test_factors_of_another_rank_than_the_configs_are_refused(verb: str, tmp_path: Path) -> None:
    whole = saved(tmp_path, r=4, target_modules=["q_proj"])
    config = json.loads((whole / "adapter_config.json").read_text())
    path = Path(shutil.copytree(whole, tmp_path / "other"))
    (path / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    verbs: dict[str, Callable[[], object]] = {
        "combine": lambda: twofold.combine({whole: 1.0, path: 1.0}, tmp_path / "out"),
        "resize": lambda: resize(path, tmp_path / "out", Size(r=2)),
        "compare": lambda: compare(whole, path),
        "kohya": lambda: export_adapter(path, "kohya", tmp_path / "out"),
        "vllm": lambda: export_adapter(path, "vllm", None, "smollm2-135m-instruct"),
    }
    with pytest.raises(AdapterFileError, match=r"q_proj' has rank 4 in the tensors but 8 by the config"):
        verbs[verb]()
    assert not (tmp_path / "out").exists()


def test_the_base_that_is_named_must_be_the_adapters(tmp_path: Path) -> None:
    model = build_model("llama")
    model.save_pretrained(tmp_path / "own")
    build_model("llama", seed=8).save_pretrained(tmp_path / "other")
    model.resize_token_embeddings(80)
    model.save_pretrained(tmp_path / "resized")
    known = Provenance(base=fingerprint(dict(build_model("llama").named_parameters())).as_json())
    given = {saved(tmp_path, provenance=known, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]): 0.5}
    for base in ("other", "resized"):
        with pytest.raises(ForeignBaseError, match="trained on a base with other"):
            twofold.combine(given, None, base=str(tmp_path / base))
    for base in ("own", "other"):
        twofold.combine(given, tmp_path / f"by-{base}", base=str(tmp_path / base), allow_foreign_base=True)
    with pytest.raises(ConfigError, match=r"'lm_head.weight' is 64 x 32, but 80 x 32 by the base"):
        twofold.combine(given, None, base=str(tmp_path / "resized"), allow_foreign_base=True)


def test_whole_modules_of_different_sizes_are_refused(tmp_path: Path) -> None:
    given = {
        saved(tmp_path, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]): w for w in (0.5, 0.49999999999)
    }
    with_tensors(next(iter(given)), {"lm_head.weight": torch.ones(80, 32)})
    with pytest.raises(
        ConfigError, match=r"'lm_head.weight' is 80 x 32 and 64 x 32: the adapters were trained on different"
    ):
        twofold.combine(given, tmp_path / "out")


def test_tokens_beyond_the_bases_vocabulary_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, r=2, target_modules=["q_proj"], trainable_token_indices=[5, 40])
    smaller = build_model("llama")
    smaller.resize_token_embeddings(32)
    smaller.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"token 40 of 'model.embed_tokens' is beyond the base's vocabulary of 32"):
        twofold.combine({path: 0.5}, tmp_path / "out", base=str(tmp_path / "base"), allow_foreign_base=True)


def test_biases_that_differ_are_refused(tmp_path: Path) -> None:
    given = {saved(tmp_path, "qwen2", r=2, bias="lora_only"): 0.5, saved(tmp_path, "qwen2", r=2): 0.5}
    with pytest.raises(ConfigError, match="train different biases"):
        twofold.combine(given, tmp_path / "out")
    alike = {saved(tmp_path, "qwen2", r=2, bias="all", modules_to_save=whole): 0.5 for whole in (None, ["lm_head"])}
    with pytest.raises(ConfigError, match=r"^'lm_head' is held whole, and the weights"):
        twofold.combine(alike, tmp_path / "out")


def test_linear_takes_no_different_ranks(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / str(r), r=r) for r in (2, 4))
    with pytest.raises(ConfigError, match="their ranks are 2, 4, and factors of different ranks have no sum"):
        twofold.combine({first: 1.0, second: 1.0}, tmp_path / "out", method="linear")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "tis"}, "did you mean 'ties'"),
        ({"method": "cat", "r": 4}, "'cat' keeps every rank"),
        ({"method": "svd", "density": 0.5}, "'svd' keeps every entry"),
        ({"method": "ties", "density": 0.0}, "density is 0.0, but must be above 0"),
        ({"method": "svd", "r": 0}, "the rank is 0, but must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        twofold.combine({saved(tmp_path, r=2, target_modules=["q_proj"]): 1.0}, tmp_path / "out", **settings)


def test_adapters_of_different_bases_are_refused(tmp_path: Path) -> None:
    def known(seed: int) -> Provenance:
        samples = torch.randn(16, generator=torch.Generator().manual_seed(seed)).tolist()
        return Provenance(base={"shapes": "x", "samples": samples, "quantization": None}, eos_token_ids=[2])

    first, second = (saved(tmp_path, provenance=known(s), r=2, target_modules=["q_proj"]) for s in (1, 2))
    with pytest.raises(ForeignBaseError, match="trained on a base with other weights"):
        twofold.combine({first: 1.0, second: 1.0}, tmp_path / "out")
    twofold.combine({first: 1.0, second: 1.0}, tmp_path / "out", allow_foreign_base=True)
    with pytest.raises(RunError, match="exists already"):
        twofold.combine({first: 1.0}, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["lora_A.weight", "lora_B.bias", "norm.weight"])
def test_values_that_are_not_finite_are_refused(suffix: str, tmp_path: Path) -> None:
    path = saved(tmp_path, r=2, target_modules=["q_proj"], lora_bias=True, modules_to_save=["norm"])
    tensors = load_file(path / "adapter_model.safetensors")
    key = next(k for k in tensors if k.endswith(suffix))
    tensors[key].view(-1)[0] = torch.nan
    save_file(tensors, path / "adapter_model.safetensors")
    said = f"'{key.removeprefix('base_model.model.')}' holds NaN or infinity"
    for work in (
        lambda: twofold.combine({path: 1.0}, tmp_path / "out"),
        lambda: resize(path, tmp_path / "out", Size(r=1)),
        lambda: compare(path, path),
    ):
        with pytest.raises(AdapterFileError, match=said):
            work()
    assert said in [f.message for f in inspect_adapter(path).findings if f.severity == "error"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(weight: float, tmp_path: Path) -> None:
    path = saved(tmp_path, r=2, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=f"is {weight}, but must be a finite number"):
        twofold.combine({path: weight}, tmp_path / "out")
    with pytest.raises(ConfigError, match="must be a finite number"):
        parse_adapter(f"{path}:{weight}")
