"""`plan`: parameters exactly as training will have them, from shapes alone; memory and time by formula."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_model
from torch import Tensor, nn
from transformers import MambaConfig, T5Config

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.shapes import module_shapes
from twofold.base.load import load_base
from twofold.errors import BaseError, ConfigError, TargetError
from twofold.native.training import native_kernels, why_not
from twofold.planning.parameters import plan_parameters
from twofold.recipes import plan as plan_module
from twofold.recipes.measure import measure, synthetic_batch
from twofold.recipes.plan import PlanSettings, bytes_in, compare, plan
from twofold.training.objective import objective_for

pytest_plugins = ("tiny_fixtures",)
GIB = 2**30


def planned(base: Path | str, **changes: Any) -> dict[str, Any]:
    settings = {"base": str(base), "dtype": "float32", "sequence_length": 64, "batch_size": 2, "device": "cpu"}
    return plan(PlanSettings(**{**settings, **changes}))


def on_a_gpu(base: str, **changes: Any) -> dict[str, Any]:
    return plan(PlanSettings(base=base, device="cuda", **changes))


# ---------------------------------------------------------------------------------------------- parameters

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "attention": {"r": 3, "target_modules": "attention"},
    "pattern": {"rank_pattern": {"q_proj": 2, "down_proj": 9}},
    "layer": {"layers_to_transform": [1]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "excluded": {"exclude_modules": ["o_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
    "every bias": {"bias": "all"},
}


@pytest.mark.parametrize("kind", ["llama_base", "tied_base", "gpt2_base"])
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_the_plan_counts_what_attaching_makes(
    kind: str, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    base = load_base(str(folder), "float32", "cpu")
    try:
        summary = attach(base.model, LoraConfig(**settings))
    except TargetError:
        with pytest.raises(TargetError):
            planned(folder, **settings)
        return
    found = planned(folder, **settings)["parameters"]
    assert found["trainable"] == summary.trainable
    assert found["base"] == summary.base
    assert found["fraction"] == summary.fraction
    if "bias" not in settings:
        assert found["modules"] == summary.modules - ("modules_to_save" in settings)


@pytest.mark.parametrize(("width", "r", "count"), [(4096, 8, 65_536), (8192, 32, 524_288)])
def test_a_square_has_the_known_number_of_factors(width: int, r: int, count: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(width, width, bias=False))
    found = plan_parameters(LoraConfig(r=r, target_modules=["0"]), module_shapes(model), width * width)
    assert found.trainable == count
    if r == 8:
        assert found.base == 256 * found.trainable


def test_planning_reads_no_weights(llama_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama_base / "config.json").read_bytes())
    without, with_weights = planned(tmp_path), planned(llama_base)
    for key in ("parameters", "memory", "loop"):
        assert without[key] == with_weights[key]


# ---------------------------------------------------------------------------------------------- memory


def test_memory_follows_what_it_is_made_of(llama_base: Path) -> None:
    one = planned(llama_base)["memory"]
    terms = [v for k, v in one.items() if k != "total"]
    assert one["total"]["expected"] == sum(terms)
    assert one["total"]["low"] < one["total"]["expected"] < one["total"]["high"]
    assert one["optimizer"] == 2 * one["gradients"] == 2 * one["adapter"]
    half = planned(llama_base, dtype="bfloat16")["memory"]
    assert half["weights"] * 2 == one["weights"]
    assert half["adapter"] == one["adapter"]
    double = planned(llama_base, batch_size=4)["memory"]
    assert double["activations"] == pytest.approx(2 * one["activations"], rel=0.01)
    assert double["weights"] == one["weights"]
    less = planned(llama_base, gradient_checkpointing=True)["memory"]
    assert less["activations"] < one["activations"]


def kept_for_the_backward(folder: Path, settings: PlanSettings) -> int:
    """Bytes that a forward pass of the fast path keeps beside the parameters, each storage counted once."""
    base = load_base(str(folder), settings.dtype, "cpu")
    attach(base.model, settings.lora)
    objective = objective_for(base.model, 0, recompute=settings.gradient_checkpointing)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        objective(synthetic_batch(settings, base.model.config.vocab_size))
    own = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


@pytest.mark.parametrize(("length", "use_dora"), [(192, False), (448, False), (704, False), (192, True), (448, True)])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels of our own", "PyTorch's operations"])
def test_the_fast_path_keeps_what_the_formula_says(
    llama_base: Path, length: int, use_dora: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples so long that filler hardly counts, and supervised as a whole, so that the last layer computes all rows."""
    if kernels and (why := why_not(torch.float32, torch.device("cpu"))):
        pytest.skip(f"no kernels here: {why}")
    if not kernels:
        monkeypatch.setattr(plan_module, "why_not", lambda *_: "switched off")
    settings = PlanSettings(
        base=str(llama_base),
        dtype="float32",
        sequence_length=length,
        batch_size=2,
        supervised_share=1.0,
        gradient_checkpointing=False,
        device="cpu",
        use_dora=use_dora,
    )
    found = plan(settings)["memory"]
    with native_kernels() if kernels else contextlib.nullcontext():
        kept = kept_for_the_backward(llama_base, settings)
    assert kept == pytest.approx(found["activations"], rel=0.1)


def test_a_quantised_base_keeps_its_embeddings_and_head_in_16_bits() -> None:
    """Llama-3.1-8B in bfloat16 takes 14.96 GiB, in NF4 with double quantisation 5.31: not 3.74, half a byte a parameter."""
    assert on_a_gpu("llama-3.1-8b")["memory"]["weights"] / GIB == pytest.approx(14.96, abs=0.005)
    four_bit = on_a_gpu("llama-3.1-8b", method="qlora")["memory"]["weights"]
    assert four_bit / GIB == pytest.approx(5.31, abs=0.005)
    assert on_a_gpu("llama-3.1-8b", quantization="nf4")["memory"]["weights"] == four_bit
    embeddings_and_norms = 2 * 128256 * 4096 + 65 * 4096
    eight_bit = on_a_gpu("llama-3.1-8b", quantization="int8")["memory"]["weights"]
    assert eight_bit == 8_030_261_248 + embeddings_and_norms


def test_the_classic_comparison_comes_out() -> None:
    """Full fine-tuning holds 16 bytes a parameter before any activation (arXiv 1910.02054), LoRA two and a little."""
    found = compare(PlanSettings(base="llama-2-7b", device="cuda", gradient_checkpointing=True))
    held = {m: sum(p["memory"][t] for t in ("weights", "adapter", "gradients", "optimizer")) for m, p in found.items()}
    assert held["full"] == 16 * 6_738_415_616
    assert held["lora"] == 2 * 6_738_415_616 + 16 * 39_976_960
    assert held["full"] > 6 * held["lora"] > 12 * held["qlora"]
    assert found["full"]["parameters"]["trainable"] == 6_738_415_616
    assert found["full"]["parameters"]["fraction"] == 1


def test_the_formulas_shown_are_those_computed(llama_base: Path) -> None:
    found = planned(llama_base)
    known = {k: s["value"] for k, s in found["symbols"].items()} | {"min": min, "max": max}
    for name, formula in found["formulas"].items():
        known[name] = eval(formula.replace("·", "*"), {}, known)
        if name in found["memory"]:
            assert round(known[name]) == found["memory"][name], name


def test_the_proof_counts_only_where_forming_a_merged_weight_outgrows_training() -> None:
    """For a model of 8B in bfloat16; its head, 128,256 x 4096, takes 10 bytes a value while it is merged."""
    little = {"sequence_length": 256, "batch_size": 1}
    assert on_a_gpu("llama-3.1-8b", **little)["memory"]["proof"] == 0
    head = on_a_gpu("llama-3.1-8b", **little, target_modules=["lm_head"])["memory"]
    freed = sum(head[t] for t in ("gradients", "optimizer", "activations", "logits", "workspace"))
    assert head["proof"] + freed == pytest.approx(10 * 128256 * 4096, rel=0.05)


def test_the_path_is_foretold(llama_base: Path, gpt2_base: Path) -> None:
    assert planned(llama_base)["loop"] == "fast"
    assert planned(gpt2_base)["loop"] == "plain"
    assert planned(llama_base, loop="peft")["loop"] == "peft"
    assert planned(llama_base, method="full")["loop"] == "full"


def test_devices_hold_a_copy_each_or_share_the_base() -> None:
    one, four = (on_a_gpu("llama-2-13b", loop="peft", devices=n) for n in (1, 4))
    four = four["devices"]
    assert four["count"] == 4
    assert four["data_parallel"] == one["memory"]
    shared = four["sharded"]
    assert shared["weights"] == pytest.approx(one["memory"]["weights"] / 4, abs=1)
    embedding_and_head, a_layer = 2 * 32000 * 5120, 4 * 5120 * 5120 + 3 * 5120 * 13824
    norms = 81 * 5120
    assert shared["gathered"] == 2 * (embedding_and_head + norms + 2 * a_layer)
    assert all(shared[t] == one["memory"][t] for t in ("adapter", "gradients", "optimizer", "activations"))
    full = on_a_gpu("llama-2-13b", devices=4, method="full")
    assert full["devices"]["sharded"]["optimizer"] == full["memory"]["optimizer"] / 4


# ---------------------------------------------------------------------------------------------- what to change


def test_each_change_saves_what_planning_with_it_says() -> None:
    found = on_a_gpu("llama-2-7b", memory="24GB")
    total, budget = found["memory"]["total"]["expected"], found["budget"]
    assert (budget["bytes"], budget["verdict"]) == (24 * 10**9, "does not fit")
    edits: dict[str, dict[str, Any]] = {
        "gradient checkpointing": {"gradient_checkpointing": True},
        "a 4-bit base": {"method": "qlora"},
        "2 examples": {"batch_size": 2},
        "at most 512": {"sequence_length": 512},
        "rank 8": {"r": 8},
    }
    *single, together = budget["changes"]
    assert [c["saves"] for c in single] == sorted((c["saves"] for c in single), reverse=True)
    assert len(single) == len(edits)
    for start, edit in edits.items():
        (told,) = [c for c in single if c["change"].startswith(start)]
        anew = on_a_gpu("llama-2-7b", memory="24GB", **edit)
        assert told["saves"] == total - anew["memory"]["total"]["expected"]
        assert told["verdict"] == anew["budget"]["verdict"]
    assert together["verdict"] == "fits"


def test_what_fits_is_told(llama_base: Path) -> None:
    assert planned(llama_base)["budget"]["verdict"] == "fits"
    high = planned(llama_base)["memory"]["total"]["high"]
    assert planned(llama_base, memory=f"{high - 1}B")["budget"]["verdict"] == "tight"
    assert planned(llama_base, memory="1MB")["budget"]["verdict"] == "does not fit"


def test_an_amount_of_memory() -> None:
    assert bytes_in("24GB") == 24 * 10**9
    assert bytes_in("1.5 GiB") == 1_610_612_736
    with pytest.raises(ConfigError, match="such as 24GB"):
        PlanSettings(memory="plenty")


@pytest.mark.parametrize(("r", "half"), [(12, 6), (6, 2), (2, None)])
def test_a_smaller_rank_is_one_that_the_start_can_have(llama_base: Path, r: int, half: int | None) -> None:
    found = planned(llama_base, r=r, init_lora_weights="orthogonal", memory="1MB")["budget"]["changes"]
    ranks = [c["change"] for c in found if c["change"].startswith("rank")]
    assert ranks == ([] if half is None else [f"rank {half} (--r {half})"])


def test_advice_is_part_of_the_plan() -> None:
    assert on_a_gpu("llama-2-7b", learning_rate=2e-4)["advice"] == []
    said = on_a_gpu("llama-2-7b", learning_rate=0.5, target_modules="attention")["advice"]
    assert len(said) == 2
    assert "learning_rate 0.5" in said[0]
    (unasked,) = on_a_gpu("llama-2-7b")["advice"]
    assert "begin with a learning_rate of 0.0003 to 0.0005" in unasked


# ---------------------------------------------------------------------------------------------- time


def test_time_grows_with_the_work(llama_base: Path) -> None:
    one = planned(llama_base)["time"]
    assert one["tokens_per_second"] == pytest.approx(128 / one["seconds_per_step"])
    again = planned(llama_base, gradient_checkpointing=True)["time"]["operations"]
    assert again["layers"] == 1.5 * one["operations"]["layers"]
    linear = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64)
    assert one["operations"]["layers"] == 4 * 128 * linear
    assert one["operations"]["head"] == 4 * 64 * planned(llama_base)["symbols"]["V"]["value"] * 32
    assert on_a_gpu("llama-2-7b")["time"] is None or torch.cuda.is_available()


# ---------------------------------------------------------------------------------------------- measured


def test_a_real_step_is_measured_in_its_own_process(llama_base: Path) -> None:
    settings = PlanSettings(base=str(llama_base), dtype="float32", sequence_length=16, batch_size=2, device="cpu")
    found = measure(settings)
    assert found["tokens"] == 32
    assert found["peak_bytes"] > found["held_bytes"] > 0
    assert found["seconds_per_step"] > 0
    assert found["path"].startswith("fast path")


def test_what_cannot_be_measured_says_why(llama_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only the shape is here, without weights"):
        measure(PlanSettings(base="llama-2-7b", method="qlora"))
    with pytest.raises(ConfigError, match="only adapters"):
        measure(PlanSettings(base=str(llama_base), method="full"))


# ---------------------------------------------------------------------------------------------- mistakes


def test_what_cannot_be_planned_is_refused(llama_base: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="q_proj"):
        planned(llama_base, target_modules=["q_porj"])
    with pytest.raises(BaseError):
        planned(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(BaseError, match="cannot read the configuration"):
        planned(tmp_path)
    T5Config(d_model=32, num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(BaseError, match=r"t5 is a t5 model, .* only causal language models .* --dry-run"):
        planned(tmp_path / "t5")
    MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64).save_pretrained(tmp_path / "mamba")
    with pytest.raises(BaseError, match="MambaForCausalLM has no attention heads"):
        planned(tmp_path / "mamba", target_modules=["in_proj"])
    with pytest.raises(ConfigError, match="batch_size is 0"):
        PlanSettings(batch_size=0)
    with pytest.raises(ConfigError, match=r"learning_rate is 0\.0 but must be above 0"):
        PlanSettings(learning_rate=0.0)
    with pytest.raises(ConfigError, match="qlora"):
        PlanSettings(method="full", quantization="nf4")


def test_a_plan_is_one_json_document(llama_base: Path) -> None:
    assert json.loads(json.dumps(planned(llama_base, devices=2)))["devices"]["count"] == 2
    assert {f.name for f in fields(LoraConfig)} < {f.name for f in fields(PlanSettings)}


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_bias": True}, {"freeze_a": True}, {"freeze_a": True, "use_dora": True, "bias": "all"}],
)
def test_variants_are_counted_as_they_train(settings: dict[str, Any]) -> None:
    """Against the model with the adapter on."""
    config = LoraConfig(r=4, **settings)
    model = build_model("llama-tied")
    planned = plan_parameters(config, module_shapes(model), 1)
    assert planned.trainable == attach(model, config).trainable
