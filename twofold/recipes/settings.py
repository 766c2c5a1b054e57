"""The configuration of a training run: what `twofold train CONFIG.yaml` reads and its flags mirror."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from twofold.adapter.config import LoraConfig, check_volume
from twofold.adapter.files import open_adapter
from twofold.base.head import TaskName
from twofold.base.load import DEFAULT_BASE, Precision
from twofold.config import build, read_yaml
from twofold.data.examples import DataConfig
from twofold.errors import ConfigError
from twofold.lowrank.init import STARTS
from twofold.lowrank.spectral_init import DATA_STARTS
from twofold.quant import Kind, Scheme
from twofold.training.optim import TrainingConfig

LORA_SETTINGS = tuple(f.name for f in fields(LoraConfig))
OF_A_FILE = tuple(name for name in LORA_SETTINGS if name != "freeze_a")
"""Those that an adapter's folder keeps: it does not say which of its factors learn."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(LoraConfig):
    """The adapter of a run.

    Attributes:
        init_from: folder of an adapter to go on from; its own settings then hold, and freeze_a is the run's.
    """

    init_from: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_volume(self)

    def lora(self) -> LoraConfig:
        """The adapter's own configuration."""
        return LoraConfig(**{n: getattr(self, n) for n in LORA_SETTINGS})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        base: a Hugging Face directory, a hub id, a `.gguf` file or a built-in name.
        task: `causal-lm`, `sequence-classification` (columns `text` and `label`; the head is trained whole), or `seq2seq`
            (columns `prompt` and `completion`; an encoder and a decoder).
        data: what is learned from.
        adapter: what is trained.
        full: train all of the base's parameters instead, and save a whole model: full fine-tuning, to compare with.
        training: how.
        output: the run folder.
        dtype: type of the frozen weights; `auto` takes what this machine multiplies fastest.
        quantization: pack the base's linear layers while they are read: `nf4` (4 bits, QLoRA) or `int8`; embeddings, norms and
            the output head stay what they are, and products are those of the unpacked weights.
        double_quantization: pack NF4's scales as well, 4.13 bits a weight instead of 4.5.
        device: `auto` takes a GPU where there is one.
        verify: prove at the end that the base is untouched and that the merged model says what the adapter says.
        allow_foreign_base: go on from an adapter that was trained on another base.
        trackers: also report to these, in the run folder; `wandb` stays offline unless WANDB_MODE says otherwise.
    """

    data: DataConfig
    base: str = DEFAULT_BASE
    task: TaskName = "causal-lm"
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    full: bool = False
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: str = "runs/latest"
    dtype: Precision = "auto"
    quantization: Kind | None = None
    double_quantization: bool = True
    device: str = "auto"
    verify: bool = True
    allow_foreign_base: bool = False
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        if self.dtype == "float16":
            raise ConfigError(
                "dtype float16 cannot train: small gradients vanish in it without loss scaling, which Twofold does not do; "
                "use bfloat16 or float32"
            )
        if self.adapter.freeze_a and self.training.loraplus_lr_ratio != 1:
            raise ConfigError(
                "training.loraplus_lr_ratio says how much faster B learns than A, but with adapter.freeze_a A does not learn at "
                "all; leave one out, and set training.learning_rate for B"
            )
        if self.quantization and self.training.parallel == "shard":
            raise ConfigError(
                "a quantised base cannot be sharded: its codes are no tensors that FSDP gathers; use training.parallel: data, or "
                "leave out quantization"
            )
        if self.data.streaming and self.training.max_steps is None:
            raise ConfigError("data.streaming needs training.max_steps, for nobody knows how long a stream is")
        if self.data.evaluation is None:
            self._check_evaluates_nothing()
        if self.full:
            self._check_full()
        if self.task != "causal-lm":
            self._check_task()

    def _check_evaluates_nothing(self) -> None:
        """Refuse what needs held-out data."""
        asked = [f"training.{n}" for n in ("evaluate_every", "early_stopping") if getattr(self.training, n) is not None]
        if asked:
            raise ConfigError(f"{' and '.join(asked)} cannot go without data.evaluation; give it held-out data")

    def _check_full(self) -> None:
        """Refuse what only an adapter has, or only a frozen base."""
        default = AdapterSettings()
        own = [f.name for f in fields(AdapterSettings) if getattr(self.adapter, f.name) != getattr(default, f.name)]
        used = {
            **{f"adapter.{name}": True for name in own},
            f"quantization: {self.quantization}": self.quantization is not None,
            "training.parallel: shard": self.training.parallel == "shard",
            "training.cache_frozen": self.training.cache_frozen,
            "training.loraplus_lr_ratio": self.training.loraplus_lr_ratio != 1,
            "training.spectrum_every": self.training.spectrum_every is not None,
        }
        if asked := [name for name, is_used in used.items() if is_used]:
            raise ConfigError(
                f"{' and '.join(asked)} cannot go with full: it trains the base itself, whole and unpacked, and there is no "
                "adapter; leave it out"
            )

    def _check_task(self) -> None:
        """Refuse what only causal language models can do."""
        used = {
            "data.streaming": self.data.streaming,
            "data.system": self.data.system is not None,
            "data.template": self.data.template is not None,
            "quantization": self.quantization is not None,
            "training.parallel: shard": self.training.parallel == "shard",
            "training.cache_frozen": self.training.cache_frozen,
            f"adapter.init_lora_weights: {self.adapter.init_lora_weights}": self.adapter.init_lora_weights
            in DATA_STARTS,
        }
        if asked := [name for name, is_used in used.items() if is_used]:
            raise ConfigError(
                f"{' and '.join(asked)} cannot go with task: {self.task}, only with causal-lm; leave it out"
            )

    @property
    def scheme(self) -> Scheme | None:
        """How the base is packed, if it is."""
        return None if self.quantization is None else Scheme(self.quantization, self.double_quantization)


def read_config(path: Path) -> TrainConfig:
    """A configuration file; paths of data and adapters in it count from where the command runs.

    Raises:
        ConfigError: every mistake in it, at once; or settings that contradict the adapter which it goes on from.
    """
    values = read_yaml(path)
    config = build(TrainConfig, values, source=str(path))
    check_continues(config.adapter, values.get("adapter", {}))
    return config


def check_continues(settings: AdapterSettings, given: Iterable[str]) -> None:
    """Refuse settings that contradict the adapter which a run goes on from.

    Args:
        settings: of the run.
        given: the names that were given by hand, whether or not they equal a default.

    Raises:
        ConfigError: names each setting and both values.
    """
    if settings.init_from is None:
        return
    own = open_adapter(Path(settings.init_from)).config
    pairs = {n: (getattr(settings, n), getattr(own, n)) for n in OF_A_FILE if n in set(given)}
    differing = [
        f"{name} is {here!r} here but {there!r} there" for name, (here, there) in pairs.items() if here != there
    ]
    if differing:
        raise ConfigError(
            f"adapter.init_from {settings.init_from} goes on with its own settings: {'; '.join(differing)}; "
            "leave these out of the configuration"
        )


def continued(settings: AdapterSettings) -> AdapterSettings:
    """The settings of the adapter that a run goes on from, in place of the defaults.

    Raises:
        ConfigError: a setting that is neither the default nor the adapter's.
    """
    if settings.init_from is None:
        return settings
    default = LoraConfig()
    check_continues(settings, [n for n in OF_A_FILE if getattr(settings, n) != getattr(default, n)])
    own = open_adapter(Path(settings.init_from)).config
    return replace(settings, **{n: getattr(own, n) for n in OF_A_FILE})


def check_factors_only(config: LoraConfig) -> None:
    """Refuse what a sharded base cannot do: whatever is a copy of weights, or read off them, that no process holds.

    Raises:
        ConfigError: names the settings.
    """
    used = {
        "modules_to_save": bool(config.modules_to_save),
        "bias": config.bias != "none",
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "init_lora_weights": config.init_lora_weights not in STARTS,
        "trainable_token_indices": bool(config.trainable_token_indices),
    }
    asked = [name for name, is_used in used.items() if is_used]
    if asked:
        raise ConfigError(
            f"adapter.{' and adapter.'.join(asked)} cannot be trained over a sharded base, of which no process holds a "
            "whole weight; leave it out, or use training.parallel: data"
        )
