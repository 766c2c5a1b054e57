"""A run's configuration as a page says it, with `ROOT/REL` for paths, and as the recipes take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from twofold.config import as_dict, build
from twofold.recipes.settings import TrainConfig, continued
from twofold.studio.roots import Roots

SOURCE = "the configuration"


def train_config(roots: Roots, values: Mapping[str, Any]) -> TrainConfig:
    """The configuration with the paths that a page's stand for.

    Raises:
        ConfigError: every mistake in it, at once.
        ApiError: a path that leads nowhere or out of the roots.
    """
    config = build(TrainConfig, values, source=SOURCE)
    data, adapter = config.data, config.adapter
    return replace(
        config,
        base=roots.base(config.base),
        data=replace(
            data,
            train=roots.named_or_found(data.train),
            evaluation=_perhaps(roots.named_or_found, data.evaluation),
            template=_perhaps(lambda name: str(roots.readable(name)), data.template),
        ),
        adapter=continued(
            replace(adapter, init_from=_perhaps(lambda name: str(roots.folder(name)), adapter.init_from))
        ),
    )


def shown_config(roots: Roots, config: TrainConfig) -> dict[str, Any]:
    """A configuration as a page calls its paths."""
    plain = as_dict(config)
    for place, key in ((plain, "base"), (plain, "output"), (plain["adapter"], "init_from")):
        place[key] = _perhaps(roots.shown, place[key])
    for key in ("train", "evaluation", "template"):
        plain["data"][key] = _perhaps(roots.shown, plain["data"][key])
    return plain


def _perhaps(change: Callable[[str], str], value: str | None) -> str | None:
    return None if value is None else change(value)
