"""Bases by reference, and whether a base is the one that an adapter was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from twofold.base.fingerprint import check_same_base, fingerprint
from twofold.base.load import ORIGIN, gguf_quantization, load_base, locate, pull
from twofold.errors import BaseError, ConfigError, ForeignBaseError
from twofold.events import Event


def weights(model: Any) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def noisy(share: float) -> dict[str, Tensor]:
    """The weights as a coarse quantisation would leave them."""
    torch.manual_seed(5)
    return {n: p + share * p.std() * torch.randn_like(p) for n, p in weights(build_model("llama")).items()}


# ---------------------------------------------------------------------------------------- fingerprint


def test_a_base_matches_itself_and_its_half_precision_copy() -> None:
    recorded = fingerprint(weights(build_model("llama"))).as_json()
    assert check_same_base(recorded, fingerprint(weights(build_model("llama"))), "a") is None
    assert check_same_base(recorded, fingerprint(weights(build_model("llama").bfloat16())), "a") is None


def test_the_order_of_the_parameters_does_not_matter() -> None:
    named = weights(build_model("llama"))
    assert fingerprint(named) == fingerprint(dict(reversed(named.items())))


@pytest.mark.parametrize("seed", [8, 9])
def test_a_base_with_other_weights_is_foreign(seed: int) -> None:
    recorded = fingerprint(weights(build_model("llama"))).as_json()
    with pytest.raises(
        ForeignBaseError, match=r"my/adapter was trained on a base with other weights .*allow-foreign-base"
    ):
        check_same_base(recorded, fingerprint(weights(build_model("llama", seed=seed))), "my/adapter")


def test_a_fine_tuned_sibling_is_foreign() -> None:
    recorded = fingerprint(weights(build_model("llama"))).as_json()
    with pytest.raises(ForeignBaseError, match="other weights"):
        check_same_base(recorded, fingerprint(noisy(0.02)), "a")


def test_other_names_or_shapes_are_foreign() -> None:
    recorded = fingerprint(weights(build_model("llama"))).as_json()
    for other in ("qwen2", "llama-tied"):
        with pytest.raises(ForeignBaseError, match="other modules or shapes"):
            check_same_base(recorded, fingerprint(weights(build_model(other))), "a")


@pytest.mark.parametrize(("theirs", "ours"), [("Q4_1", None), (None, "Q4_1"), ("Q4_1", "Q8_0")])
def test_a_quantised_form_matches_only_where_one_side_is_said_to_be(theirs: str | None, ours: str | None) -> None:
    recorded = fingerprint(weights(build_model("llama")), theirs).as_json()
    said = check_same_base(recorded, fingerprint(noisy(0.05), ours), "a")
    assert said is not None
    assert "another precision" in said
    with pytest.raises(ForeignBaseError):
        check_same_base(recorded, fingerprint(weights(build_model("llama", seed=8)), ours), "a")


def test_a_damaged_fingerprint_is_told() -> None:
    with pytest.raises(ConfigError, match="missing key 'samples'"):
        check_same_base({"shapes": "x"}, fingerprint(weights(build_model("llama"))), "a")


# ---------------------------------------------------------------------------------------- loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny base as a Hugging Face folder."""
    path = tmp_path / "tiny-base"
    build_model("llama").save_pretrained(path)
    core = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "lamp": 2, "on": 3}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    made.save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_becomes_a_frozen_base(folder: Path, dtype: Any) -> None:
    said: list[Event] = []
    base = load_base(str(folder), dtype=dtype, device="cpu", emit=said.append)
    assert base.dtype is getattr(torch, dtype)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.public_name == "tiny-base"
    assert base.fingerprint.quantization is None
    assert base.renderer.completion_prompt("lamp on") == [2, 3]
    assert 1 in base.renderer.end_token_ids
    assert base.fingerprint == fingerprint(weights(build_model("llama")))
    assert any(f"loading {folder} in {dtype} on cpu" in str(e.record()) for e in said)


def test_the_fingerprint_is_taken_before_adapters_rename_modules(folder: Path) -> None:
    from twofold.adapter.attach import attach
    from twofold.adapter.config import LoraConfig

    base = load_base(str(folder), dtype="float32", device="cpu")
    attach(base.model, LoraConfig())
    assert base.fingerprint == fingerprint(weights(build_model("llama")))


def test_a_converted_folder_remembers_its_quantisation(folder: Path) -> None:
    (folder / ORIGIN).write_text('{"quantization": "Q4_1"}')
    assert load_base(str(folder), dtype="float32", device="cpu").fingerprint.quantization == "Q4_1"


def test_a_damaged_folder_is_told_in_one_sentence(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(BaseError, match=rf"cannot load a causal language model from {folder}: .") as caught:
        load_base(str(folder), dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)


def test_references_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for reference, said in (
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'?"),
        (str(tmp_path / "nothing"), "no base at"),
        ("./a/b/c", "no base at './a/b/c'"),
        (str(tmp_path / "model.gguf"), "no GGUF file at"),
        (str(tmp_path / "empty"), "is not a model folder: it has no config.json"),
    ):
        with pytest.raises(BaseError) as caught:
            locate(reference)
        assert said in str(caught.value)
    with pytest.raises(BaseError, match=r"no built-in base 'smolm2'.*there is smollm2-135m-instruct"):
        pull("smolm2")


def test_hub_ids_and_folders_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate("some/model") == "some/model"
    assert locate(str(folder)) == str(folder)
    monkeypatch.chdir(folder.parent)
    (Path("some") / "model").mkdir(parents=True)
    with pytest.raises(BaseError, match=r"it has no config.json"):
        locate("some/model")


@pytest.mark.parametrize(
    ("name", "format_"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("model-q8_0.gguf", "Q8_0"),
        ("Qwen2.5-7B-Instruct-IQ3_XS.gguf", "IQ3_XS"),
        ("Qwen2-0.5B-f16.gguf", None),
        ("Qwen3-0.6B-BF16.gguf", None),
        ("llama.gguf", None),
    ],
)
def test_the_quantisation_is_read_off_a_file_name(name: str, format_: str | None) -> None:
    assert gguf_quantization(name) == format_
