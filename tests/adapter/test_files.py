"""Adapter folders: the same bytes every time, whole or absent, and nothing in them skipped in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build_model, logits, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from twofold.adapter.attach import activate, active, attach, attached, config_of, shares
from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.files import Provenance, load_adapter, open_adapter, save_adapter, split_key
from twofold.errors import AdapterFileError, ConfigError, RunError, UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"


def learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def saved(path: Path, family: str = "llama", **settings: Any) -> Path:
    """A random adapter on disk."""
    model = build_model(family)
    attach(model, LoraConfig(**{"r": 4, "target_modules": ("q_proj", "v_proj"), **settings}))
    randomise(learned(model))
    return save_adapter(model, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter")


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def test_modules_come_in_the_order_of_their_layers(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    attach(model, LoraConfig(r=1, target_modules="all-linear"))
    assert list(open_adapter(save_adapter(model, tmp_path / "a")).modules()) == [str(i) for i in range(12)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))}


def refusal(folder: Path, model: nn.Module | None = None) -> str:
    """The message with which a load is refused; the model must be as before."""
    model = model or build_model("llama")
    before = logits(model)
    structure, learning, working = repr(model), [p.requires_grad for p in model.parameters()], active(model)
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(model, folder, "loaded")
    assert repr(model) == structure
    assert [p.requires_grad for p in model.parameters()] == learning
    assert active(model) == working
    assert torch.equal(logits(model), before)
    return str(caught.value)


# ---------------------------------------------------------------------------------------- writing


def test_what_is_saved_loads_again_bit_for_bit(folder: Path) -> None:
    model, again = build_model("llama"), build_model("llama")
    load_adapter(model, folder)
    load_adapter(again, save_adapter(model, folder.parent / "again"))
    assert torch.equal(logits(model), logits(again))
    assert bytes_of(folder) == bytes_of(folder.parent / "again")
    assert {n: resolve(config_of(again), n) for n in shares(again, "default")} == {
        n: resolve(LoraConfig(r=4), n) for n in shares(model, "default")
    }


def test_equal_adapters_give_equal_bytes_whatever_came_first(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2, "v_proj": 3})
    two = saved(tmp_path / "two", target_modules=["v_proj", "q_proj"], rank_pattern={"v_proj": 3, "q_proj": 2})
    model = build_model("llama")
    attach(model, LoraConfig(r=7, target_modules="mlp"), "earlier")
    attach(model, LoraConfig(r=4, target_modules=r".*\.(v|q)_proj", rank_pattern={"v_proj": 3, "q_proj": 2}), "named")
    named = {n.replace(".named.", ".default."): p for n, p in learned(model)}
    randomise(list(named.items()))
    three = save_adapter(model, tmp_path / "three", "named")
    assert bytes_of(one) == bytes_of(two) == bytes_of(three)


def test_a_folder_gives_way_only_to_a_whole_one_and_leaves_no_crumbs(folder: Path) -> None:
    (folder / "twofold.json").write_text("{}")
    saved(folder, r=2)
    assert sorted(bytes_of(folder)) == [CONFIG, TENSORS]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_folder_with_other_things_in_it_is_never_replaced(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    before = bytes_of(folder)
    with pytest.raises(RunError, match=r"other things than an adapter \(tokenizer.json\)"):
        saved(folder, r=2)
    assert bytes_of(folder) == before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write .*file/adapter"):
        saved(tmp_path / "file" / "adapter")
    assert (tmp_path / "file").read_text() == "in the way"
    model = build_model("llama")
    with pytest.raises(ConfigError, match="no adapter named 'default'"):
        save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_provenance_comes_back_and_holds_no_time_and_no_path(tmp_path: Path) -> None:
    model = build_model("llama")
    attach(model, LoraConfig(r=2))
    told = Provenance(
        base={"shapes": "x", "samples": [1.5]}, chat_template="{{ x }}", eos_token_ids=[2], training={"steps": 3}
    )
    path = save_adapter(model, tmp_path / "a", provenance=told, base_name="some/base")
    opened = open_adapter(path)
    assert opened.provenance == told
    assert opened.base_name == "some/base"
    assert str(tmp_path) not in "".join(p.read_text(errors="ignore") for p in path.iterdir())
    assert open_adapter(saved(tmp_path / "b")).provenance is None


# ---------------------------------------------------------------------------------------- strictness


def test_all_tensors_that_do_not_fit_are_listed_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[KEY.format("q_proj", "A")]
        tensors[KEY.format("v_proj", "B")] = torch.zeros(3, 4)
        tensors["base_model.model.model.norm.weight"] = torch.zeros(32)
        tensors[KEY.format("q_proj", "B").replace("0", "1")][0, 0] = float("nan")

    edit_tensors(folder, spoil)
    said = refusal(folder)
    for expected in (
        f"missing tensor '{KEY.format('q_proj', 'A')}'",
        f"'{KEY.format('v_proj', 'B')}' has shape (3, 4) where this model needs (16, 4)",
        "unexpected tensor 'base_model.model.model.norm.weight'",
        "'model.layers.1.self_attn.q_proj.lora_B.weight' holds NaN or infinity",
    ):
        assert expected in said, said


def test_modules_that_the_file_or_the_model_lacks_are_listed(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for side in "AB":
            del tensors[KEY.format("q_proj", side)]
            tensors[f"base_model.model.model.layers.7.self_attn.q_proj.lora_{side}.weight"] = torch.zeros(4, 4)
            tensors[KEY.format("k_proj", side)] = torch.zeros(4, 4)

    edit_tensors(folder, spoil)
    said = refusal(folder)
    assert "no module 'model.layers.7.self_attn.q_proj' in this model" in said
    assert "'model.layers.0.self_attn.q_proj' is a target of the config but has no tensors" in said
    assert "'model.layers.0.self_attn.k_proj' has tensors but is no target of the config" in said


def test_all_that_is_wrong_comes_in_one_message(folder: Path) -> None:
    """A module too many, one too few, a wrong rank, a wrong shape, a missing and a spoiled tensor."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        for side in "AB":
            tensors[KEY.format("k_proj", side)] = torch.zeros(4, 4)
            del tensors[KEY.format("q_proj", side)]
        first, second = (KEY.replace("layers.0", "layers.1").format(p, "{}") for p in ("q_proj", "v_proj"))
        tensors[first.format("A")] = torch.full((3, 32), torch.nan)
        tensors[second.format("A")] = torch.zeros(4, 31)
        del tensors[second.format("B")]
        tensors["base_model.model.stray"] = torch.zeros(1)

    edit_tensors(folder, spoil)
    said = refusal(folder)
    for problem in (
        "'model.layers.0.self_attn.q_proj' is a target of the config but has no tensors",
        "'model.layers.0.self_attn.k_proj' has tensors but is no target of the config",
        "'model.layers.1.self_attn.q_proj' has rank 3 in the tensors but 4 by the config",
        "'model.layers.1.self_attn.q_proj.lora_A.weight' holds NaN or infinity",
        "v_proj.lora_A.weight' has shape (4, 31) where this model needs (4, 32)",
        "missing tensor 'base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight'",
        "unexpected tensor 'base_model.model.stray'",
    ):
        assert said.count(problem) == 1, said
    assert said.count(";") == 6, said


def test_an_adapter_of_another_family_is_refused_by_its_modules(folder: Path) -> None:
    assert "no module 'model.layers.0.self_attn.q_proj' in this model" in refusal(folder, build_model("gpt2"))


def test_a_rank_other_than_the_configs_is_refused(folder: Path) -> None:
    edit_config(folder, r=8)
    assert "'model.layers.0.self_attn.q_proj' has rank 4 in the tensors but 8 by the config" in refusal(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(folder: Path, bad: float) -> None:
    edit_tensors(folder, lambda t: t[KEY.format("q_proj", "A")].view(-1)[3:4].fill_(bad))
    assert "q_proj.lora_A.weight' holds NaN or infinity" in refusal(folder)


def test_a_resized_vocabulary_is_refused_with_both_shapes(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", target_modules=("embed_tokens", "q_proj"))
    wider = LlamaForCausalLM(LlamaConfig(**{**build_model("llama").config.to_dict(), "vocab_size": 72})).eval()
    said = refusal(path, wider)
    assert "lora_embedding_A' has shape (4, 64) where this model needs (4, 72)" in said


def test_a_refused_load_leaves_other_adapters_at_work(folder: Path) -> None:
    model = build_model("llama")
    attach(model, LoraConfig(r=2, target_modules="mlp"), "working")
    randomise(learned(model))
    attach(model, LoraConfig(r=2, target_modules="mlp"), "idle")
    activate(model, {"working": 0.5})
    edit_tensors(folder, lambda t: t.pop(KEY.format("q_proj", "A")))
    refusal(folder, model)
    assert active(model) == {"working": 0.5}
    assert attached(model) == ["working", "idle"]


def test_a_base_embedding_that_peft_saved_beside_must_be_this_bases(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build_model("llama"), peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    theirs.save_pretrained(tmp_path / "a")
    assert any("base_layer.weight" in k for k in load_file(tmp_path / "a" / TENSORS))
    load_adapter(build_model("llama"), tmp_path / "a")
    assert "unexpected tensor 'base_model.model.model.embed_tokens.base_layer.weight'" in refusal(
        tmp_path / "a", build_model("llama", seed=8)
    )


def test_the_head_of_an_embedding_trained_whole_is_no_second_name_of_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", "llama-tied", modules_to_save=["embed_tokens"])
    key = "base_model.model.{}.weight"
    edit_tensors(path, lambda t: t.update({key.format("lm_head"): t[key.format("model.embed_tokens")].clone()}))
    assert "unexpected tensor 'base_model.model.lm_head.weight'" in refusal(path, build_model("llama-tied"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True, "lora_bias": True}, "use_dora cannot go with lora_bias"),
        ({"use_qalora": True, "arrow_config": {"top_k": 3}}, "arrow_config={'top_k': 3}, use_qalora=True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"made_up_later": 3}, "made_up_later=3"),
        ({"peft_type": "IA3"}, "describes a IA3 adapter"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changed the base"),
        ({"r": "four"}, "'r' is 'four' but should be a whole number"),
        ({"bias": "some"}, "'bias' is 'some' but may be none, lora_only, all"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder: Path, changes: dict[str, Any], said: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UserError) as caught:
        load_adapter(build_model("llama"), folder)
    assert said in str(caught.value)
    assert CONFIG in str(caught.value)


def test_settings_that_change_nothing_are_taken(folder: Path) -> None:
    inert = {
        "use_dora": False,
        "megatron_config": None,
        "loftq_config": {},
        "peft_version": "9.9",
        "inference_mode": False,
    }
    edit_config(folder, **inert, layers_to_transform=None, init_lora_weights="orthogonal", made_up_later=None)
    model, plain = build_model("llama"), build_model("llama")
    load_adapter(model, folder)
    edit_config(folder, init_lora_weights=True)
    load_adapter(plain, folder)
    assert torch.equal(logits(model), logits(plain))


def test_damaged_missing_and_pickled_files_are_told_apart(folder: Path, tmp_path: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 20, 3, 0):
        (folder / TENSORS).write_bytes(whole[:cut])
        assert "damaged or not a safetensors file" in refusal(folder)
    (folder / TENSORS).unlink()
    assert f"{TENSORS} does not exist" in refusal(folder)
    torch.save({}, folder / "adapter_model.bin")
    assert "is a pickle" in refusal(folder)
    (folder / TENSORS).write_bytes(whole)
    load_adapter(build_model("llama"), folder)
    for text, said in (("{", "is not valid JSON"), ("[]", "should hold a JSON object"), ("\xff", "not valid JSON")):
        (folder / CONFIG).write_text(text, encoding="latin-1")
        assert said in refusal(folder)
    (folder / CONFIG).unlink()
    assert "is this an adapter folder?" in refusal(folder)
    shutil.rmtree(folder)
    assert "no adapter folder at" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        (KEY.format("q_proj", "A"), ("model.layers.0.self_attn.q_proj", "lora_A.weight")),
        ("base_model.model.wte.lora_embedding_B", ("wte", "lora_embedding_B")),
        ("base_model.model.h.0.attn.base_layer.bias", ("h.0.attn", "base_layer.bias")),
        ("base_model.model.lm_head.weight", ("lm_head", "weight")),
    ],
)
def test_keys_are_split_at_the_module(key: str, parts: tuple[str, str]) -> None:
    assert split_key(key) == parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_into_float32_factors(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    model = build_model("llama")
    load_adapter(model, folder)
    assert {p.dtype for _, p in learned(model)} == {torch.float32}
