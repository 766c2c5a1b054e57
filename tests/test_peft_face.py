"""Scripts written for PEFT run with `twofold.peft`: the same calls on both, the same numbers out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build_model, logits, randomise
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import twofold.peft as face
from twofold.adapter.attach import attached
from twofold.errors import AdapterFileError, ConfigError, TargetError
from twofold.peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model

FILE = "adapter_model.safetensors"


def ours(**settings: Any) -> Any:
    return get_peft_model(build_model("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM, **settings))


def random_adapter(path: Path, seed: int = 1, **settings: Any) -> Path:
    """Written by PEFT itself."""
    model = peft.get_peft_model(
        build_model("llama"),
        peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings}),
    )
    randomise([(n, p) for n, p in model.named_parameters() if "lora_" in n], seed=seed)
    model.save_pretrained(path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, Any]:
    """Two adapters of PEFT's, loaded by the same calls there and here."""
    folders = random_adapter(tmp_path / "a"), random_adapter(tmp_path / "b", seed=2, r=2, use_rslora=True)
    models = []
    for library in (peft, face):
        model = library.PeftModel.from_pretrained(build_model("llama"), folders[0], adapter_name="a")  # type: ignore[attr-defined]
        model.load_adapter(folders[1], adapter_name="b")
        models.append(model.eval())
    return models[0], models[1]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_first_steps_say_the_same_in_both(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for library in (peft, face):
        config = library.LoraConfig(task_type=library.TaskType.CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.1)  # type: ignore[attr-defined]
        model = library.get_peft_model(build_model("llama"), config)  # type: ignore[attr-defined]
        model.print_trainable_parameters()
        said.append(capsys.readouterr().out)
        assert model.peft_config["default"].r == 8
        assert model.active_adapter == "default"
        assert model.active_adapters == ["default"]
        assert isinstance(model, library.PeftModel)  # type: ignore[attr-defined]
    assert said[0] == said[1]
    assert "trainable params" in said[1]


def test_usual_targets_are_those_of_peft() -> None:
    for family, targets in face.QUERY_AND_VALUE.items():
        assert set(targets) == set(USUAL[family]), family
    assert get_peft_model(build_model("gpt2"), LoraConfig()).peft_config["default"].target_modules == ("c_attn",)
    with pytest.raises(ConfigError, match="target_modules is not given"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig())
    with pytest.raises(TargetError, match="'q_prj' matches no module; did you mean 'q_proj'"):
        ours(target_modules=["q_prj", "v_proj"])


def test_choosing_disabling_deleting_and_merging_are_those_of_peft(pair: tuple[Any, Any]) -> None:
    theirs, here = pair
    assert here.active_adapters == theirs.active_adapters == ["a"]
    for step in (
        lambda m: m.set_adapter("b"),
        lambda m: m.base_model.set_adapter(["a", "b"]) if m is theirs else m.set_adapter(["a", "b"]),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.set_adapter("a"),
        lambda m: m.delete_adapter("b"),
    ):
        before = logits(here)
        step(theirs), step(here)
        close(logits(here), logits(theirs))
        assert set(here.peft_config) == set(theirs.peft_config)
        with theirs.disable_adapter(), here.disable_adapter():
            close(logits(here), logits(build_model("llama")))
    assert not torch.allclose(before, logits(build_model("llama")))


def test_mixed_batches_are_those_of_peft(pair: tuple[Any, Any]) -> None:
    theirs, here = pair
    ids, names = torch.arange(12).view(4, 3) + 1, ["a", "__base__", "b", "a"]
    with torch.no_grad():
        close(here(input_ids=ids, adapter_names=names).logits, theirs(input_ids=ids, adapter_names=names).logits)
        told = [m.generate(input_ids=ids, adapter_names=names, max_new_tokens=4, do_sample=False) for m in pair]
    assert torch.equal(*told)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert-classifier"])
def test_merging_and_unloading_leaves_a_plain_model(family: str, tmp_path: Path) -> None:
    bare, model = build_model(family), build_model(family)
    targets = {"gpt2": ["c_attn", "wte"], "bert-classifier": ["query"]}.get(family, ["q_proj", "embed_tokens"])
    whole = ["classifier"] if family == "bert-classifier" else None
    before = {n: t.clone() for n, t in model.state_dict().items()}
    kept = dict(model.state_dict())
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, modules_to_save=whole))
    randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad], scale=0.1)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(bare)
    close(logits(merged), expected)
    assert all(torch.equal(kept[n], t) for n, t in before.items()), "the base's own tensors are never written"
    merged.save_pretrained(tmp_path / "merged")
    close(logits(type(merged).from_pretrained(tmp_path / "merged").eval()), expected)


def test_unloading_gives_the_base_back() -> None:
    model = ours(r=2)
    randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    plain = model.unload()
    assert type(plain) is LlamaForCausalLM
    assert torch.equal(logits(plain), logits(build_model("llama")))


def test_merging_that_would_not_be_finite_is_refused_and_undone() -> None:
    model = ours(r=2)
    expected = logits(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith(".A"):
                parameter.fill_(float("nan"))
    with pytest.raises(ConfigError, match="NaN or infinity"):
        model.merge_and_unload(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_concatenating_is_the_exact_weighted_sum(pair: tuple[Any, Any]) -> None:
    _, here = pair
    here.add_weighted_adapter(["a", "b"], [0.7, -1.5], "both", combination_type="cat")
    assert here.active_adapters == ["a"]
    here.set_adapter("both")
    found = logits(here)
    face.live.activate(here, {"a": 0.7, "b": -1.5})
    close(found, logits(here))
    with pytest.raises(ConfigError, match="'cat' is exact"):
        here.add_weighted_adapter(["a", "b"], [1.0, 1.0], "other", combination_type="linear")


def test_what_is_saved_loads_in_peft_and_back(tmp_path: Path) -> None:
    model = ours(r=4, target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    assert model.active_adapters == ["default"]
    randomise([(n, p) for n, p in model.named_parameters() if ".shares." in n])
    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build_model("llama"), tmp_path).eval()
    close(logits(theirs), logits(model))
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.peft_type, config.task_type) == (4, "LORA", "CAUSAL_LM")
    again: Any = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(tmp_path / "second", "second", is_trainable=True)
    again.set_adapter("second")
    model.set_adapter("second")
    assert torch.equal(logits(again), logits(model))
    assert (tmp_path / "tokenizer.json").exists()


def test_state_dicts_are_strict() -> None:
    model, other = ours(r=4), ours(r=4)
    randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    state = face.get_peft_model_state_dict(model)
    assert set(state) == set(
        peft.get_peft_model_state_dict(peft.get_peft_model(build_model("llama"), peft.LoraConfig(r=4)))
    )
    face.set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other), logits(model))
    with torch.no_grad():
        next(p for p in other.parameters() if p.requires_grad).add_(1)
    assert not torch.equal(logits(other), logits(model)), "it holds a copy"
    key, tensor = state.popitem()
    with pytest.raises(AdapterFileError, match=rf"missing tensor '{key}'; unexpected tensor 'x'"):
        face.set_peft_model_state_dict(other, {**state, "x": tensor})


def test_trainer_trains_saves_and_peft_loads_the_checkpoint(tmp_path: Path) -> None:
    base = face.prepare_model_for_kbit_training(
        build_model("llama"), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"]))
    assert isinstance(model, PreTrainedModel)
    rows = [{"input_ids": torch.arange(i, i + 6) % 60, "labels": torch.arange(i, i + 6) % 60} for i in range(16)]
    settings = TrainingArguments(
        str(tmp_path), max_steps=12, save_steps=6, logging_steps=1, learning_rate=0.02, report_to=[], use_cpu=True
    )
    trainer = Trainer(model, settings, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    trainer.save_model(str(tmp_path))
    last = tmp_path / "checkpoint-12"
    assert {k: t.shape for k, t in load_file(last / FILE).items()} == {
        k: t.shape for k, t in load_file(tmp_path / FILE).items()
    }
    assert not list(tmp_path.rglob("model.safetensors"))
    theirs = peft.PeftModel.from_pretrained(build_model("llama"), last).eval()
    close(logits(theirs), logits(model.eval()))
    assert attached(model) == ["default"]
