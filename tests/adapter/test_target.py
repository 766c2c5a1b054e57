"""From patterns to modules: presets, exclusions and layers on every family, and every mistake in one message."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from families import CAUSAL, FAMILIES, build_model, logits, randomise
from hypothesis import example, given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import Llama4TextConfig
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from twofold.adapter.attach import adapter_layers, attach
from twofold.adapter.config import LoraConfig, check_volume, resolve
from twofold.adapter.shapes import module_shapes
from twofold.adapter.target import find_targets
from twofold.errors import ConfigError, TargetError

ATTENTION = {
    "gpt2": {"c_attn", "attn.c_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "self_attn.dense"},
    "phi3": {"qkv_proj", "o_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "bert": {"query", "key", "value", "attention.output.dense"},
    "bert-classifier": {"query", "key", "value", "attention.output.dense"},
    "t5": {"q", "k", "v", "o"},
}
MLP = {
    "gpt2": {"c_fc", "mlp.c_proj"},
    "phi": {"fc1", "fc2"},
    "phi3": {"gate_up_proj", "down_proj"},
    "opt": {"fc1", "fc2"},
    "bert": {"intermediate.dense", "layer.0.output.dense", "layer.1.output.dense"},
    "bert-classifier": {"intermediate.dense", "layer.0.output.dense", "layer.1.output.dense"},
    "t5": {"wi", "wo"},
}
SELF_ATTENTION, GATED_MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


def linear_names(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def named(model: nn.Module, endings: set[str]) -> set[str]:
    return {n for n in linear_names(model) if any(n.endswith(f".{e}") for e in endings)}


def chosen(model: nn.Module, **settings: object) -> set[str]:
    return set(find_targets(LoraConfig(**settings), module_shapes(model)).adapted)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_name_the_parts_of_every_family(family: str) -> None:
    model = build_model(family)
    attention = named(model, ATTENTION.get(family, SELF_ATTENTION))
    mlp = named(model, MLP.get(family, GATED_MLP))
    assert attention
    assert mlp
    assert chosen(model, target_modules="attention") == attention
    assert chosen(model, target_modules="mlp") == mlp
    assert chosen(model, target_modules="all-linear") >= attention | mlp


@pytest.mark.parametrize("family", CAUSAL)
def test_all_linear_leaves_the_output_head_alone(family: str) -> None:
    model = build_model(family)
    assert chosen(model, target_modules="all-linear") == linear_names(model) - {"lm_head"}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_same_on_a_model_without_weights(family: str) -> None:
    with torch.device("meta"):
        weightless = build_model(family)
    assert next(weightless.parameters()).is_meta
    assert module_shapes(weightless) == module_shapes(build_model(family))


def test_an_adapted_model_shows_the_shapes_of_its_base() -> None:
    model = build_model("gpt2")
    before = module_shapes(model)
    attach(model, LoraConfig(target_modules=("c_attn", "wte"), modules_to_save=("ln_f",), bias="all"))
    assert module_shapes(model) == before


def test_exclusion_by_ending_and_by_expression() -> None:
    model = build_model("llama")
    everything = chosen(model)
    assert chosen(model, exclude_modules=("down_proj",)) == {n for n in everything if not n.endswith("down_proj")}
    assert chosen(model, exclude_modules=r".*layers\.1\..*") == {n for n in everything if ".1." not in n}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5"])
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1), 1])
@pytest.mark.parametrize("lists", [None, ["layers", "block", "layer", "h"]])
def test_layers_to_transform_is_that_of_peft(
    family: str, layers: tuple[int, ...] | int, lists: list[str] | None
) -> None:
    model = build_model(family)
    targets = [{"gpt2": "c_fc", "opt": "fc1", "bert": "query", "t5": "q"}.get(family, "up_proj")]
    targets += [] if family == "bert" else ["lm_head"]
    theirs = peft.LoraConfig(
        target_modules=targets,
        layers_to_transform=layers if isinstance(layers, int) else list(layers),
        layers_pattern=lists,
    )
    expected = {n for n, _ in model.named_modules() if check_target_module_exists(theirs, n)}
    assert len(expected) > 1 or family == "bert"
    assert chosen(model, target_modules=targets, layers_to_transform=layers, layers_pattern=lists) == expected


def test_layers_are_counted_in_the_named_list() -> None:
    model = build_model("t5")
    found = chosen(model, target_modules=("q",), layers_to_transform=(1,), layers_pattern="block")
    assert {n.split(".block.")[1][0] for n in found} == {"1"}


NAMES = [n for n, _ in build_model("llama").named_modules() if n.endswith("proj")]
PIECES = [
    "q_proj",
    "proj",
    r".*proj",
    r"0\..*",
    r"layers\.1\..*",
    "self_attn.q_proj",
    "model.*",
    "up",
    "",
    "mlp.up_proj",
]


@given(
    ranks=st.dictionaries(st.sampled_from(PIECES), st.integers(1, 64), max_size=4),
    alphas=st.dictionaries(st.sampled_from(PIECES), st.integers(1, 64), max_size=4),
    r=st.integers(1, 16),
    stabilised=st.booleans(),
)
@example(ranks={"up_proj|q_proj": 3}, alphas={"q_proj|up_proj": 5}, r=2, stabilised=False)
def test_rank_and_scale_of_a_module_are_those_of_peft(
    ranks: dict[str, int], alphas: dict[str, int], r: int, stabilised: bool
) -> None:
    """PEFT resolves them while it wraps a module; here its own pattern look-up is asked, name by name."""
    from peft.utils.other import get_pattern_key

    config = LoraConfig(r=r, lora_alpha=7, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=stabilised)
    for name in NAMES:
        rank = ranks.get(get_pattern_key(ranks.keys(), name), r)
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), 7)
        found = resolve(config, name)
        assert (found.r, found.alpha) == (rank, alpha)
        assert found.scale == pytest.approx(alpha / (rank**0.5 if stabilised else rank))


def test_every_mistake_is_in_one_message_with_the_nearest_names() -> None:
    config = LoraConfig(
        target_modules=("q_prj", "up_proj", "vproj"),
        exclude_modules=("lm_hed",),
        modules_to_save=("embed_token",),
        rank_pattern={"down_proj": 3},
        alpha_pattern={"up_porj": 4.0},
        layers_to_transform=(1, 7),
    )
    with pytest.raises(TargetError) as caught:
        attach(build_model("llama"), config)
    said = str(caught.value)
    for expected in (
        "target_modules 'q_prj' matches no module; did you mean 'q_proj'",
        "target_modules 'vproj' matches no module; did you mean 'v_proj'",
        "exclude_modules 'lm_hed' matches no module; did you mean 'lm_head'",
        "modules_to_save 'embed_token' matches no module; did you mean 'embed_tokens'",
        "rank_pattern 'down_proj' matches no adapted module",
        "alpha_pattern 'up_porj' matches no adapted module; did you mean 'up_proj'",
        "layers_to_transform 7: no such layer; the model's layers are 0 to 1",
    ):
        assert expected in said, said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": r"model\.q_proj"}, "matches no module"),
        ({"target_modules": "al-linear"}, "did you mean 'all-linear'"),
        ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "leaves nothing to adapt"),
        ({"target_modules": ("self_attn",)}, "neither linear nor an embedding nor a convolution; name those inside it"),
        ({"modules_to_save": ("act_fn",)}, r"'model.layers.0.mlp.act_fn' in modules_to_save has no parameters"),
        ({"target_modules": ("norm", "q_proj")}, "'model.norm' matches target_modules but is neither linear"),
    ],
)
def test_targets_that_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(TargetError, match=said):
        attach(build_model("llama"), LoraConfig(**settings))  # type: ignore[arg-type]


def test_positions_that_are_called_with_a_mask_are_refused_by_their_class_but_may_be_trained_whole() -> None:
    with pytest.raises(
        TargetError, match=r"embed_positions' matches .* is a OPTLearnedPositionalEmbedding, whose forward"
    ):
        attach(build_model("opt"), LoraConfig(target_modules=("embed_positions", "q_proj")))
    model = build_model("opt").requires_grad_(False)
    bare = logits(model)
    attach(model, LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("embed_positions",)))
    assert torch.equal(logits(model), bare)
    randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad and "embed_positions" in n])
    assert not torch.allclose(logits(model), bare)


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Inheriting(nn.Linear):
    pass


STRANGE = {
    "doubling": lambda: Doubling(4, 4),
    "router": lambda: Llama4Router(Llama4TextConfig(hidden_size=4, num_local_experts=4)),
    "scaled_but_for_images": lambda: T5Gemma2TextScaledWordEmbedding(4, 4, 0),
    "positions": lambda: BartLearnedPositionalEmbedding(4, 4),
    "attention.out_proj": lambda: nn.MultiheadAttention(4, 1),
}
KNOWN = {
    "inheriting": (lambda: Inheriting(4, 4), torch.randn(3, 4)),
    "falcon": (lambda: FalconLinear(4, 4), torch.randn(3, 4)),
    "bart": (lambda: BartScaledWordEmbedding(4, 4, 0, embed_scale=3.0), torch.tensor([1, 3])),
    "gemma": (lambda: Gemma3TextScaledWordEmbedding(4, 4, 0, embed_scale=3.0), torch.tensor([1, 3])),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_kind_of_linear_or_embedding_with_a_forward_of_its_own_is_refused(name: str) -> None:
    model = nn.ModuleDict({name.split(".", 1)[0]: STRANGE[name](), "plain": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match=f"'{name}' matches target_modules but is a .*leave it out"):
        attach(model, LoraConfig(r=2, target_modules=[name, "plain"]))
    assert chosen(model, target_modules="all-linear") == {"plain"}


@pytest.mark.parametrize("name", KNOWN)
def test_kinds_that_compute_the_same_are_adapted_and_merge(name: str) -> None:
    make, x = KNOWN[name]
    model = nn.ModuleDict({name: make()})
    attach(model, LoraConfig(r=2, target_modules=[name]))
    randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    layer: Any = model[name]
    changed = copy.deepcopy(layer.base)
    with torch.no_grad():
        changed.weight += layer.delta()
    torch.testing.assert_close(layer(x), changed(x))
    layer.merge()
    torch.testing.assert_close(layer(x), changed(x))


def test_what_is_trained_whole_is_not_adapted_by_a_preset_too() -> None:
    model = build_model("llama")
    attach(model, LoraConfig(target_modules="all-linear", modules_to_save=("mlp",)))
    names = {n for n, _ in adapter_layers(model)}
    assert "model.layers.0.mlp" in names
    assert not any(n.startswith("model.layers.0.mlp.") for n in names)


def test_a_module_named_both_adapted_and_saved_is_refused() -> None:
    with pytest.raises(TargetError, match=r"'lm_head' is in both target_modules and modules_to_save"):
        attach(build_model("llama"), LoraConfig(target_modules=("q_proj", "lm_head"), modules_to_save=("lm_head",)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 0}, "rank must be at least 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"init_lora_weights": "pisa"}, "may be true, false, gaussian"),
    ],
)
def test_configs_that_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoraConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_alpha": 0}, "lora_alpha is 0 but must be above 0"),
        ({"lora_alpha": -8}, "lora_alpha is -8 but must be above 0"),
        ({"alpha_pattern": {"q_proj": 0.0}}, "alpha_pattern 'q_proj' is 0.0 but must be above 0"),
    ],
)
def test_an_alpha_with_which_nothing_is_learned_may_be_read_but_not_trained_with(
    settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_volume(LoraConfig(**settings))  # type: ignore[arg-type]


def test_lists_and_sets_are_taken_like_tuples() -> None:
    assert LoraConfig(target_modules=["q_proj", "v_proj"]).target_modules == ("q_proj", "v_proj")
    assert LoraConfig(layers_to_transform=3).layers == {3}
    assert LoraConfig(modules_to_save=["norm"]) == LoraConfig(modules_to_save=("norm",))


def test_no_layer_of_the_tiny_models_is_forgotten() -> None:
    """The names above are spelled by hand; together they must cover every linear map but heads and poolers."""
    for family in FAMILIES:
        model = build_model(family)
        spelled = named(model, ATTENTION.get(family, SELF_ATTENTION) | MLP.get(family, GATED_MLP))
        left = linear_names(model) - spelled
        assert all(any(w in n for w in ("lm_head", "pooler", "classifier", "predictions")) for n in left), left
        assert torch.is_grad_enabled()
