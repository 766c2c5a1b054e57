"""The flags of a run, as `train` and its search for a learning rate share them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from twofold.cli.flags import given_flags, parse
from twofold.config import read_yaml
from twofold.errors import ConfigError
from twofold.recipes.settings import TrainConfig, check_continues, read_config
from twofold.training.rate import RateSearch

DESCRIPTION = (
    "Train an adapter: twofold train CONFIG.yaml, any key of which may be overridden by its flag. "
    "--resume goes on from the newest checkpoint, --dry-run stops before the first step, --json prints the report. "
    "--find-lr trains for a few steps at each of several learning rates instead, and suggests one (--find-lr --help)."
)
BARE = ("--json", "--resume", "--dry-run", "--find-lr")
C = TypeVar("C", bound=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class SearchFlags(TrainConfig):
    """A training run whose learning rate is sought.

    Attributes:
        find_lr: the short runs.
    """

    find_lr: RateSearch = field(default_factory=RateSearch)


def config_from(arguments: list[str], cls: type[C]) -> C:
    """The file, if one is named first, with the flags over it.

    Raises:
        ConfigError: the file stands behind a flag, which would take it for its value.
    """
    behind = [a for a in arguments[1:] if a.endswith((".yaml", ".yml"))]
    if behind and arguments[0].startswith("-"):
        raise ConfigError(f"name the configuration before the flags: twofold train {behind[0]} {arguments[0]} ...")
    file = read_config(Path(arguments[0])) if arguments and not arguments[0].startswith("-") else None
    flags = arguments[1:] if file else arguments
    default = cls(**vars(file)) if file else None
    config = parse(cls, flags, verb="train", description=DESCRIPTION, default=default, bare=BARE)
    given = [f.removeprefix("--adapter.").replace("-", "_") for f in given_flags(flags) if f.startswith("--adapter.")]
    check_continues(config.adapter, [*given, *(read_yaml(Path(arguments[0])).get("adapter", {}) if file else ())])
    return config
