"""`merge`: a standard folder that says, on its own, what the adapter said."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from twofold.adapter.attach import activate, attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.base.load import Base, load_base
from twofold.errors import ConfigError, ProofError, RunError
from twofold.merging.checkpoint import write_merged
from twofold.recipes import adapters, merge
from twofold.recipes.merge import merge_checkpoint, merge_from_disk, verify_folder

pytest_plugins = ("tiny_fixtures",)

IDS = torch.tensor([[5, 17, 250, 33, 90, 4, 260]])


def adapted(folder: Path, dtype: Any = "float32", *names: str, **settings: Any) -> Base:
    """A base with adapters that change something."""
    base = load_base(str(folder), dtype, "cpu")
    for i, name in enumerate(names or ("default",)):
        attach(base.model, LoraConfig(**{"r": 4, **settings}), name)
        generator = torch.Generator().manual_seed(30 + i)
        for parameter in (p for p in base.model.parameters() if p.requires_grad):
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05
    return base


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def reloaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


SETTINGS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved-norm": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["llama_base", "tied_base"])
def test_the_merged_folder_says_what_the_adapter_says(
    kind: str, settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    base = adapted(folder, **settings)
    said, bare = logits(base.model), logits(reloaded(folder))
    found = merge_checkpoint(base, tmp_path / "merged")
    merged = reloaded(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), said, rtol=1e-4, atol=1e-4)
    assert (said - bare).abs().max() > 0.05
    assert found["verification"]["passed"]
    assert {k: tuple(v.shape) for k, v in merged.state_dict().items()} == {
        k: tuple(v.shape) for k, v in reloaded(folder).state_dict().items()
    }


def test_the_template_goes_into_the_folder_and_not_into_the_callers_tokenizer(llama_base: Path, tmp_path: Path) -> None:
    base = adapted(llama_base)
    before = base.tokenizer.chat_template
    write_merged(base.model, base.tokenizer, tmp_path / "merged", chat_template="{{ messages[0]['content'] }}")
    assert base.tokenizer.chat_template == before
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages[0]['content'] }}"
    with pytest.raises(RunError, match="exists already"):
        write_merged(base.model, base.tokenizer, tmp_path / "merged", chat_template="other")
    assert base.tokenizer.chat_template == before


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_update_of_one_of_two_tied_weights_cuts_the_tie(target: str, tied_base: Path, tmp_path: Path) -> None:
    base = adapted(tied_base, target_modules=[target])
    before = reloaded(tied_base).get_input_embeddings().weight
    write_merged(base.model, base.tokenizer, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    merged = reloaded(tmp_path / "merged")
    one, other = merged.model.embed_tokens.weight, merged.lm_head.weight
    changed, kept = (one, other) if target == "embed_tokens" else (other, one)
    assert torch.equal(kept, before)
    assert not torch.equal(changed, before)
    assert base.model.config.tie_word_embeddings is True


def test_a_tie_that_no_update_touches_stays(tied_base: Path, tmp_path: Path) -> None:
    base = adapted(tied_base)
    write_merged(base.model, base.tokenizer, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_several_weighted_adapters_merge_as_they_are_active(llama_base: Path, tmp_path: Path) -> None:
    base = adapted(llama_base, "float32", "one", "two")
    activate(base.model, {"one": 0.3, "two": -1.2})
    said = logits(base.model)
    merge_checkpoint(base, tmp_path / "merged")
    torch.testing.assert_close(logits(reloaded(tmp_path / "merged")), said, rtol=1e-4, atol=1e-4)


def test_merging_leaves_the_model_and_the_base_as_they_were(llama_base: Path, tmp_path: Path) -> None:
    base = adapted(llama_base)
    said = logits(base.model)
    merge_checkpoint(base, tmp_path / "merged")
    assert torch.equal(logits(base.model), said)
    detach(base.model)
    assert torch.equal(logits(base.model), logits(reloaded(llama_base)))


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(llama_base: Path, tmp_path: Path) -> None:
    base = adapted(llama_base, "bfloat16")
    layer = base.model.model.layers[0].mlp.up_proj
    share = layer.shares["default"]
    expected = (layer.weight.double() + share.scale * share.B.double() @ share.A.double()).bfloat16()
    write_merged(base.model, base.tokenizer, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert found.dtype == torch.bfloat16
    assert (found != expected).double().mean() < 0.002  # double and float32 sums may round to different neighbours
    assert verify_folder(base, tmp_path / "merged", None, lambda _: None).passed


def test_a_gpt2_merges_its_transposed_weights(gpt2_base: Path, tmp_path: Path) -> None:
    base = adapted(gpt2_base)
    said = logits(base.model)
    assert merge_checkpoint(base, tmp_path / "merged")["verification"]["passed"]
    torch.testing.assert_close(logits(reloaded(tmp_path / "merged")), said, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_and_its_template_go_along(llama_base: Path, tmp_path: Path) -> None:
    base = adapted(llama_base)
    merge_checkpoint(base, tmp_path / "merged")
    found = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert found.chat_template == base.renderer.template
    assert found("colour of the hat?")["input_ids"] == base.tokenizer("colour of the hat?")["input_ids"]


def test_a_spoiled_folder_does_not_pass(llama_base: Path, tmp_path: Path) -> None:
    base = adapted(llama_base)
    merge_checkpoint(base, tmp_path / "merged")
    path = tmp_path / "merged" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.self_attn.v_proj.weight"][2, 2] += 0.05
    save_file(weights, path, metadata={"format": "pt"})
    found = verify_folder(base, tmp_path / "merged", None, lambda _: None)
    assert not found.passed
    with pytest.raises(ProofError, match="differs from the adapter"):
        found.require("it")


def test_what_cannot_be_merged_is_refused(llama_base: Path, tmp_path: Path) -> None:
    base = adapted(llama_base)
    activate(base.model, None)
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_checkpoint(base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    activate(base.model, "default")
    (tmp_path / "there").mkdir()
    with pytest.raises(RunError, match="exists already"):
        merge_checkpoint(base, tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())


def test_the_proof_holds_one_model_at_a_time(llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = adapted(llama_base)
    save_adapter(base.model, tmp_path / "adapter")
    alive: list[weakref.ref[Any]] = []
    load = load_base

    def counted(*given: Any, **named: Any) -> Base:
        assert not any(model() is not None for model in alive)
        found = load(*given, **named)
        alive.append(weakref.ref(found.model))
        return found

    for module in (merge, adapters):
        monkeypatch.setattr(module, "load_base", counted)
    asked = adapters.Asked(base=str(llama_base), adapters=(str(tmp_path / "adapter"),), dtype="float32")
    assert merge_from_disk(asked, tmp_path / "merged")["verification"]["passed"]
    assert len(alive) == 2
