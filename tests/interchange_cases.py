"""Every kind of file that PEFT writes for LoRA, one line each: the test proves them and docs/interchange.md lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import transformers as hf
from families import GROUPED, build_model, logits
from torch import Tensor, nn


def _seeded(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().eval()


def _convolution(dimensions: int, groups: int = 1) -> Callable[[], nn.Module]:
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    return lambda: nn.Sequential(kind(4, 8, 3, padding=1, groups=groups), nn.GELU())


def _image(model: Any) -> Tensor:
    base = model if isinstance(model, nn.Sequential) else model.base_model.model
    size = (2, 4, *(5,) * (base[0].weight.dim() - 2))
    found: Tensor = model(torch.linspace(-1, 1, torch.Size(size).numel()).view(size))
    return found


def _attention() -> nn.Module:
    return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)})


def _attended(model: Any) -> Tensor:
    inner = model if isinstance(model, nn.ModuleDict) else model.base_model.model
    x = torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8)
    return cast(Tensor, inner["attn"](x, x, x, need_weights=False)[0])


def _mixture() -> nn.Module:
    config: Any = hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    return hf.MixtralForCausalLM(config)


@dataclass(frozen=True)
class Case:
    """A kind of file: settings that both take alike, the model they are for, and how that runs.

    Attributes:
        refused_read: what Twofold says of PEFT's file, where it refuses it.
        refused_written: what Twofold says of the settings, where it refuses them.
        converted: PEFT's file is saved with `path_initial_model_for_weight_conversion`, against the start.
        doubled: PEFT adds the update of an output projection twice.
        words: settings that PEFT's config gets once the adapter is made, where making it so needs more than a test has: a GPU
            for LoftQ, several trained adapters for Arrow. What is refused is refused for these words.
    """

    name: str
    settings: dict[str, Any]
    model: str | Callable[[], nn.Module] = "llama"
    run: Callable[[Any], Tensor] = logits
    refused_read: str = ""
    refused_written: str = ""
    converted: bool = False
    doubled: bool = False
    words: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        return build_model(self.model) if isinstance(self.model, str) else _seeded(self.model)

    @property
    def start(self) -> str:
        """The start that has to be computed before or after the adapter is made."""
        return str(self.settings.get("init_lora_weights", ""))


def _started(start: str, **settings: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": start, **settings}


def _both(sentence: str) -> dict[str, Any]:
    return {"refused_read": sentence, "refused_written": sentence}


QV = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CHANGED = "changed the base when training began, so the adapter does not fit the plain base"
KEPT = "have one weight, which ensure_weight_tying keeps"
NO_CORDA = "init_lora_weights is 'corda' but may be"
BLOCKS = {"target_modules_bd_a": ["v_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
CASES = [
    Case("linear", {"target_modules": "all-linear"}),
    Case("Hugging Face's Conv1D", {"target_modules": ["c_attn", "c_fc"]}, "gpt2"),
    Case("embedding", {"target_modules": ["embed_tokens"]}),
    Case("embedding tied to the head", {"target_modules": ["embed_tokens", "q_proj"]}, "llama-tied"),
    Case("lm_head", {"target_modules": ["lm_head", "q_proj"]}),
    Case("lm_head tied to the embedding", {"target_modules": ["lm_head", "q_proj"]}, "llama-tied"),
    Case("Conv1d", {"target_modules": ["0"]}, _convolution(1), _image),
    Case("Conv2d", {"target_modules": ["0"]}, _convolution(2), _image),
    Case("Conv3d", {"target_modules": ["0"]}, _convolution(3), _image),
    Case("Conv2d with groups", {"target_modules": ["0"]}, _convolution(2, groups=2), _image),
    Case("MultiheadAttention", {"target_modules": ["attn"]}, _attention, _attended, doubled=True),
    Case("experts in three dimensions", {"target_modules": [], "target_parameters": EXPERTS}, _mixture),
    Case("a parameter in two dimensions", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}, _mixture),
    Case("trained tokens", {**QV, "trainable_token_indices": [5, 9]}),
    Case("trained tokens by module", {**QV, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [9, 11]}}),
    Case("trained tokens, tied", {**QV, "trainable_token_indices": [5, 9]}, "llama-tied"),
    Case("modules_to_save: the head", {**QV, "modules_to_save": ["lm_head"]}),
    Case("modules_to_save: the embedding", {**QV, "modules_to_save": ["embed_tokens"]}),
    Case(
        "modules_to_save: the embedding and its tied head",
        {**QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "llama-tied",
        refused_written=KEPT,
    ),
    Case(
        "embedding and its tied head",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        "llama-tied",
        refused_written=KEPT,
    ),
    Case(
        "modules_to_save: a classifier",
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
        "bert-classifier",
    ),
    Case("encoder and decoder", {"target_modules": ["q", "v"]}, "t5"),
    Case("bias: all", {**QV, "bias": "all"}, "llama-tied"),
    Case("bias: lora_only", {**QV, "bias": "lora_only"}, "llama-tied"),
    Case("lora_bias", {**QV, "lora_bias": True}),
    Case("rsLoRA", {**QV, "use_rslora": True}),
    Case("rank_pattern", {**QV, "rank_pattern": {r"0\..*q_proj": 2}}),
    Case("alpha_pattern", {**QV, "alpha_pattern": {"v_proj": 3, r"1\..*q_proj": 5}}),
    Case(
        "both patterns and rsLoRA",
        {**QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    ),
    Case("an expression for targets", {"target_modules": r".*\.1\..*(q_proj|up_proj)"}),
    Case("some layers", {**QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    Case("some layers of an encoder and a decoder", {"target_modules": ["q", "v"], "layers_to_transform": [1]}, "t5"),
    Case("some layers in lists of two names", {**QV, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    Case("some layers, and a head by its name", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]}),
    Case("all but some", {"target_modules": "all-linear", "exclude_modules": ["v_proj", "down_proj"]}),
    Case("DoRA", {"target_modules": "all-linear", "use_dora": True}),
    Case("DoRA and rsLoRA", {**QV, "use_dora": True, "use_rslora": True}),
    Case("Gaussian start", {**QV, "init_lora_weights": "gaussian"}),
    Case("random start", {**QV, "init_lora_weights": False}),
    Case("orthogonal start", {**QV, "init_lora_weights": "orthogonal"}),
    Case("PiSSA", _started("pissa")),
    Case("PiSSA, converted", _started("pissa"), converted=True),
    Case("fast PiSSA", _started("pissa_niter_4"), refused_read=CHANGED),
    Case("fast PiSSA, converted", _started("pissa_niter_4"), converted=True),
    Case("OLoRA", _started("olora")),
    Case("OLoRA, converted", _started("olora"), converted=True),
    Case("EVA", _started("eva")),
    Case("LoRA-GA", _started("lora_ga"), refused_read=CHANGED),
    Case("LoRA-GA, converted", _started("lora_ga"), converted=True),
    Case("CorDA", _started("corda"), refused_read=CHANGED, refused_written=NO_CORDA),
    Case("CorDA, converted", _started("corda"), converted=True, refused_written=NO_CORDA),
    Case("LoftQ", _started("loftq"), refused_read=CHANGED, words={"init_lora_weights": "loftq"}),
    Case("MiCA", _started("mica"), refused_written="init_lora_weights is 'mica' but may be"),
    Case(
        "VeLoRA",
        {**QV, "velora_config": {"num_groups": 4}},
        refused_written="freeze_a keeps no inputs for the gradient",
    ),
    Case("KaSA", {**QV, "kasa_config": {"beta": 0.1}}, **_both("KaSA cuts the base's own weights down")),
    Case("aLoRA", {**QV, "alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}, **_both("aLoRA is not done")),
    Case("BD-LoRA", {**QV, "use_bdlora": BLOCKS}, **_both("BD-LoRA is not done")),
    Case("MonteCLoRA", {**QV, "monteclora_config": {"num_samples": 2}}, **_both("MonteCLoRA is not done")),
    Case("QALoRA", {**QV, "use_qalora": True}, **_both("QALoRA is not done")),
    Case(
        "Arrow",
        {**QV, "arrow_config": {"top_k": 1}},
        **_both("Arrow's routing is not done"),
        words={"arrow_config": {"top_k": 1}},
    ),
    Case("layer_replication", {**QV, "layer_replication": [[0, 1], [0, 2]]}, **_both("layers are not doubled")),
]
