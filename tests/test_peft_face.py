"""Scripts written for PEFT run with `twofold.peft`: the same calls on both, the same numbers out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build_model, logits, randomise
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL
from torch import Tensor
from transformers import LlamaForCausalLM

import twofold.peft as face
from twofold.adapter.attach import activate, attached
from twofold.errors import AdapterFileError, ConfigError, TargetError
from twofold.merging.methods import METHODS
from twofold.peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from twofold.peft.arguments import CHANGES_NOTHING
from twofold.peft.config import NO_EFFECT, NOT_DONE, QUERY_AND_VALUE

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
    for family, targets in QUERY_AND_VALUE.items():
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


def deltas(model: Any, name: str) -> dict[str, Tensor]:
    activate(model, name)
    return {n: layer.delta() for n, layer in face.model.live.adapter_layers(model)}


@pytest.mark.parametrize("method", [*METHODS, "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], "all-linear"], ids=["embedding", "linear"])
def test_one_adapter_combined_alone_stays_what_it_is(method: str, targets: Any) -> None:
    model = ours(r=4, lora_alpha=3, use_rslora=True, target_modules=targets)
    randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type=method, density=1.0)
    assert model.active_adapters == ["default"]
    expected = deltas(model, "default")
    for module, found in deltas(model, "same").items():
        assert (found - expected[module]).norm() <= 1e-6 * expected[module].norm(), module


@pytest.mark.parametrize("method", ["cat", "svd", "dare_linear", "magnitude_prune"])
def test_sums_are_exact_where_the_rank_allows(method: str, pair: tuple[Any, Any]) -> None:
    _, here = pair
    here.add_weighted_adapter(["a", "b"], [0.7, -1.5], "both", combination_type=method, svd_rank=6)
    here.set_adapter("both")
    found = logits(here)
    activate(here, {"a": 0.7, "b": -1.5})
    close(found, logits(here))
    assert here.peft_config["both"].r == 6


def test_truncating_is_that_of_peft_and_says_what_is_lost(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """Without rank-stabilised scales, which PEFT gets wrong."""
    folders = random_adapter(tmp_path / "c", seed=3), random_adapter(tmp_path / "d", seed=4)
    models: list[Any] = []
    for library in (peft, face):
        model: Any = library.PeftModel.from_pretrained(build_model("llama"), folders[0], adapter_name="a")  # type: ignore[attr-defined]
        model.load_adapter(folders[1], adapter_name="b")
        models.append(model.eval())
    theirs, here = models
    theirs.add_weighted_adapter(["a", "b"], [0.7, -1.5], "both", svd_rank=3)
    with pytest.warns(UserWarning, match="of the energy of the combined update"):
        here.add_weighted_adapter(["a", "b"], [0.7, -1.5], "both", svd_rank=3)
    theirs.set_adapter("both"), here.set_adapter("both")
    torch.testing.assert_close(logits(here), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:adapter .* lost")
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_thinned_updates_are_those_of_the_formula(method: str, pair: tuple[Any, Any]) -> None:
    """At full rank nothing is cut off, so the whole deltas can be compared."""
    _, here = pair
    one, two = deltas(here, "a"), deltas(here, "b")
    torch.manual_seed(5)
    here.add_weighted_adapter(["a", "b"], [0.7, -1.5], "both", combination_type=method, density=0.5, svd_rank=32)
    torch.manual_seed(5)
    for module, found in deltas(here, "both").items():
        parts = [0.7 * one[module], -1.5 * two[module]]
        if "dare" in method:
            parts = [torch.where(torch.rand(p.shape) < 0.5, p / 0.5, 0.0) for p in parts]
        else:
            least = [p.abs().flatten().topk(p.numel() // 2).values[-1] for p in parts]
            parts = [torch.where(p.abs() >= t, p, 0.0) for p, t in zip(parts, least, strict=True)]
        expected = parts[0] + parts[1]
        if "ties" in method:
            agree = [(p * expected > 0).float() for p in parts]
            mass = 0.7 * agree[0] + 1.5 * agree[1]
            summed = parts[0] * agree[0] + parts[1] * agree[1]
            expected = torch.where(mass > 0, summed / mass.clamp_min(1e-9), 0.0) * 2.2
        assert (found - expected).norm() <= 1e-5 * expected.norm(), module


def test_combinations_that_would_be_wrong_are_refused(pair: tuple[Any, Any]) -> None:
    _, here = pair
    with pytest.raises(ConfigError, match=r"by 'linear' in 'model.*factors of different ranks have no sum"):
        here.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="linear")
    with pytest.raises(ConfigError, match=r"'tie' is none of .*; did you mean 'ties'"):
        here.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="tie")
    with pytest.raises(ConfigError, match="density is 0"):
        here.add_weighted_adapter(["a"], [1.0], "c", combination_type="ties", density=0.0)
    with pytest.raises(ConfigError, match="2 adapters have 1 weights"):
        here.add_weighted_adapter(["a", "b"], [1.0], "c")
    with pytest.raises(ConfigError, match="attached already"):
        here.add_weighted_adapter(["a"], [1.0], "b")
    assert here.active_adapters == ["a"]
    for settings in ({"use_dora": True}, {"bias": "all"}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}):
        model = get_peft_model(build_model("llama-tied"), LoraConfig(r=2, **settings))
        with pytest.raises(ConfigError, match="more than the two factors"):
            model.add_weighted_adapter(["default"], [1.0], "c", combination_type="cat")
        assert attached(model) == ["default"]


def test_convolutions_are_combined_too() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    model: Any = get_peft_model(plain, LoraConfig(r=2, target_modules=["0", "2"]))
    randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    x = torch.randn(5, 4, 3, 3)
    expected = model(x)
    model.add_weighted_adapter(["default"], [1.0], "same")
    model.set_adapter("same")
    close(model(x), expected)


def test_settings_that_are_not_done_are_refused_with_a_reason() -> None:
    harmless = {"loftq_config": {}, "use_qalora": False, "qalora_group_size": 16, "megatron_core": "megatron.core"}
    assert LoraConfig(**harmless).r == 8
    known = set(peft.LoraConfig.__dataclass_fields__)
    assert known - set(LoraConfig.__dataclass_fields__) <= set(NOT_DONE) | NO_EFFECT, "every setting is answered"
    for name, why in NOT_DONE.items():
        with pytest.raises(ConfigError, match=name) as caught:
            LoraConfig(**{name: {"a": 1}})
        assert why in str(caught.value)
    with pytest.raises(ConfigError, match="no 'lora_alfa'; did you mean 'lora_alpha'"):
        LoraConfig(lora_alfa=3)


def test_arguments_are_accepted_where_they_change_nothing(tmp_path: Path) -> None:
    path = random_adapter(tmp_path / "a")
    model: Any = PeftModel.from_pretrained(
        build_model("llama"), path, "a", is_trainable=True, low_cpu_mem_usage=True, torch_device="cpu", key_mapping=None
    )
    assert all(p.requires_grad for n, p in model.named_parameters() if ".shares." in n)
    model.save_pretrained(tmp_path / "b", safe_serialization=True, save_embedding_layers="auto")
    with pytest.raises(ConfigError, match=r"safe_serialization=False is not done here: .* can run code"):
        model.save_pretrained(tmp_path / "b", safe_serialization=False)
    with pytest.raises(ConfigError, match="mixed=True is not done here"):
        get_peft_model(build_model("llama"), LoraConfig(), mixed=True)
    assert all(accepted and why for accepted, why in CHANGES_NOTHING.values())


FEATURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"use_dora": True, "target_modules": "all-linear"}),
    ("llama", {"lora_bias": True}),
    ("llama", {"init_lora_weights": "pissa", "use_rslora": True}),
    ("llama", {"init_lora_weights": "olora"}),
    ("llama", {"init_lora_weights": "orthogonal", "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 3}}),
    ("llama", {"layers_to_transform": [1], "layers_pattern": ["layers"], "target_modules": ["q_proj"]}),
    ("llama-tied", {"bias": "lora_only", "target_modules": ["q_proj"]}),
    ("llama", {"trainable_token_indices": [5, 9], "exclude_modules": ["v_proj"]}),
    ("llama", {"modules_to_save": ["lm_head"], "target_modules": {"q_proj", "up_proj"}}),
    ("bert-classifier", {"task_type": "SEQ_CLS"}),
    ("t5", {"task_type": "SEQ_2_SEQ_LM"}),
    ("gpt2", {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "settings"), FEATURES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_what_the_settings_make_is_what_they_make_in_peft(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(build_model(family), peft.LoraConfig(r=4, **settings))
    here: Any = get_peft_model(build_model(family), LoraConfig(r=4, **settings))
    assert here.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in here.named_parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    here.save_pretrained(tmp_path / "a")
    back = peft.PeftModel.from_pretrained(build_model(family), tmp_path / "a").eval()
    torch.testing.assert_close(logits(back), logits(here.eval()), rtol=1e-4, atol=1e-4)


def test_a_config_alone_is_written_and_read_by_both(tmp_path: Path) -> None:
    LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(tmp_path / "ours")
    assert peft.LoraConfig.from_pretrained(tmp_path / "ours").r == 4
    peft.LoraConfig(r=5, target_modules=["q_proj"]).save_pretrained(tmp_path / "theirs")
    assert PeftConfig.from_pretrained(tmp_path / "theirs").r == 5


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
