"""The optimiser, its schedule and the settings of a training.

Weight decay pulls the adapted model towards its base, and nothing else: one step of it takes lr · weight_decay off the update
s·BA. Decaying both factors, as AdamW over all parameters does, takes that off twice, more with LoRA+, and makes A smaller even
where the update is zero; so B alone is decayed (for embeddings A, which carries the zero), by the rate of the run whatever
LoRA+ makes of B's. A copy of a whole module is decayed as in full fine-tuning. Where the update is counted from a start
(PiSSA, OLoRA), decaying the factors would decay the base's own main part, so what decays is their distance from the start.
Biases and DoRA's lengths, whatever their shape, are left alone. The reasons are in docs/decisions/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from twofold.config import check_seed
from twofold.errors import ConfigError
from twofold.layers.dora import MatrixShare
from twofold.layers.embedding import EmbeddingShare
from twofold.layers.experts import ParameterFactors
from twofold.layers.linear import LinearShare


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How an adapter is trained.

    Attributes:
        batch_size: examples in one optimiser step, over all processes.
        micro_batch_size: examples in one forward pass; smaller ones are accumulated to a step, weighted by
            supervised tokens. The whole batch, or the process's share of it, at once when
            not given.
        micro_batch_tokens: tokens in one forward pass, about; a step's examples are then packed into as few passes as
            hold them, longest first.
        epochs: passes over the data.
        max_steps: stop after so many steps.
        learning_rate: at its highest, after warm-up. The default is for models of billions; SmolLM2 did best at ten times that
            (docs/evidence).
        schedule: how it falls afterwards: `cosine` or `linear` to zero, or `constant`.
        warmup: share of the steps in which the rate rises linearly from zero.
        loraplus_lr_ratio: how many times faster B learns than A (LoRA+, arXiv 2402.12354, which found 16 good together with a
            lower learning_rate); 1 for alike.
        weight_decay: share of learning_rate by which each step shrinks the update itself, B·A, and with it the distance from
            the base.
        beta1: of AdamW.
        beta2: of AdamW.
        gradient_clip: largest norm of the whole gradient; 0 for none.
        share_prefixes: compute once what several examples of a batch begin with; exact, and only on the fast path.
        cache_frozen: remember each example's states below the lowest layer that learns, so that they are computed once in all
            epochs; worth its memory (two bytes a value in bfloat16, for every token of the data) where only upper layers learn.
        compile: let torch.compile make single kernels of the norms, activations and losses on the fast path; worth its half minute
            in long runs, above all on a GPU.
        gradient_checkpointing: keep only each layer's input and compute the rest again: less memory, a third slower.
        evaluate_every: steps between evaluations; only at the end when not given.
        early_stopping: stop after so many evaluations without a better loss.
        spectrum_every: steps between records of each module's singular values, which `twofold studio` shows growing; none when
            not given.
        checkpoint_every: steps between checkpoints; null for none.
        keep_checkpoints: how many of the newest stay on disk.
        seed: of the start, the order of the data and dropout.
        parallel: what several processes (torchrun) share: `data` gives each a whole base and a share of every step's
            examples; `shard` spreads the base over them as well (FSDP2), for one that no device holds alone.
    """

    batch_size: int = 16
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    epochs: int = 1
    max_steps: int | None = None
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    loraplus_lr_ratio: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    gradient_clip: float = 1.0
    share_prefixes: bool = True
    cache_frozen: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    early_stopping: int | None = None
    spectrum_every: int | None = None
    checkpoint_every: int | None = 200
    keep_checkpoints: int = 2
    seed: int = 0
    parallel: Literal["data", "shard"] = "data"

    def __post_init__(self) -> None:
        counts = ("batch_size", "micro_batch_size", "micro_batch_tokens", "epochs", "max_steps", "evaluate_every")
        for name in (*counts, "early_stopping", "spectrum_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value} but must be at least 1")
        check_seed(self.seed)
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate} but must be above 0")
        if not 0 < self.loraplus_lr_ratio < math.inf:
            raise ConfigError(f"loraplus_lr_ratio is {self.loraplus_lr_ratio} but must be above 0, as in 16")
        if self.gradient_clip < 0 or self.weight_decay < 0 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(
                "gradient_clip and weight_decay must be at least 0, beta1 and beta2 at least 0 and below 1"
            )
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is {self.warmup} but must be a share of the steps, at least 0 and below 1")
        if self.early_stopping and not self.evaluate_every:
            raise ConfigError("early_stopping needs evaluate_every: it counts evaluations without a better loss")


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule."""
    warm = round(config.warmup * steps)
    if step < warm:
        return config.learning_rate * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (1 - done if config.schedule == "linear" else 1)


def optimiser(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over what learns in a model, in one fused pass over all tensors of a kind.

    Each group says in `ratio` how many times the run's learning rate is its own: see `set_rate`.
    """
    groups = parameter_groups(model, config)
    narrow = any(p.dtype.itemsize < 4 for group in groups for p in group["params"])
    optimise = (MasterAdamW if narrow else torch.optim.AdamW)(groups, betas=(config.beta1, config.beta2), fused=True)
    set_rate(optimise, config.learning_rate)
    starts = _starts(model) if config.weight_decay else []
    if starts:
        optimise.register_step_pre_hook(lambda o, *_: _pull(starts, o.param_groups[0], config.weight_decay))
    return optimise


class MasterAdamW(torch.optim.AdamW):
    """AdamW over 16-bit parameters, of which it keeps float32 values: in 16 bits most steps would round away.

    Only full fine-tuning has such parameters; those of adapters are float32.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One parameter at a time, so that one wide gradient is alive."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            wide = parameter.float()
            state |= {"master": wide, "exp_avg": torch.zeros_like(wide), "exp_avg_sq": torch.zeros_like(wide)}
            state["step"] = torch.zeros((), device=parameter.device)
        beta1, beta2 = group["betas"]
        adamw(
            [state["master"]],
            [cast(Tensor, parameter.grad).float()],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        parameter.copy_(state["master"])


def set_rate(optimise: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the run's learning rate."""
    for group in optimise.param_groups:
        group["lr"] = rate * group["ratio"]


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """What learns, by how fast it learns and whether it decays to zero; parameters keep the model's order in each.

    `ratio` of a group is how many times the run's learning rate its own is.
    """
    modules = list(model.modules())
    faster = {id(p) for m in modules for p in _faster(m)}
    spared = {id(p) for m in modules for p in _not_decayed(m)}
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            ratio = config.loraplus_lr_ratio if id(parameter) in faster else 1.0
            decay = 0.0 if parameter.dim() < 2 or id(parameter) in spared else config.weight_decay / ratio
            found.setdefault((ratio, decay), []).append(parameter)
    by_rate = sorted(found.items(), key=lambda item: item[0])
    return [{"params": ps, "ratio": ratio, "weight_decay": decay} for (ratio, decay), ps in by_rate]


def _faster(module: nn.Module) -> list[Tensor]:
    """What LoRA+ gives a rate of its own."""
    if isinstance(module, LinearShare):
        return [module.B] if module.b_bias is None else [module.B, module.b_bias]
    return [module.B] if isinstance(module, ParameterFactors) else []


def _not_decayed(module: nn.Module) -> list[Tensor]:
    """DoRA's lengths, and the factors whose decay would not be the update's."""
    lengths = [module.magnitude] if isinstance(module, MatrixShare) and module.magnitude is not None else []
    if isinstance(module, EmbeddingShare):
        return [module.B, *lengths]
    if isinstance(module, LinearShare):
        return [module.A, *([] if module.start_B is None else [module.B]), *lengths]
    return [module.A] if isinstance(module, ParameterFactors) else []


def _starts(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Learned factors with the start that their update is counted from."""
    return [
        (factor, start)
        for s in model.modules()
        if isinstance(s, LinearShare)
        for factor, start in ((s.A, s.start_A), (s.B, s.start_B))
        if start is not None and factor.requires_grad
    ]


@torch.no_grad()
def _pull(pairs: Sequence[tuple[Tensor, Tensor]], group: dict[str, Any], decay: float) -> None:
    """Take lr · decay off the distance from the start."""
    torch._foreach_lerp_([p for p, _ in pairs], [s for _, s in pairs], group["lr"] / group["ratio"] * decay)
