"""`twofold preview`: the data as the model will see it, without loading the model."""

from __future__ import annotations

from typing import Any

from twofold.base.load import load_renderer
from twofold.base.shapes import meta_model
from twofold.data.examples import load_examples
from twofold.errors import ConfigError
from twofold.events import Emit, silent
from twofold.recipes.preflight import tokens_shown
from twofold.recipes.settings import TrainConfig
from twofold.recipes.tasks import at_most, learned_positions


def preview(config: TrainConfig, examples: int, emit: Emit = silent) -> dict[str, Any]:
    """The account of the training data, and its first examples token by token.

    Raises:
        UserError: the base's tokenizer or the data cannot be read, the task needs the model itself, or `examples` is negative.
    """
    if examples < 0:
        raise ConfigError(f"examples is {examples}, but must be at least 0")
    if config.task != "causal-lm":
        raise ConfigError(
            f"preview reads data without the model, which task: {config.task} asks for its classes and positions; use twofold "
            "train --dry-run, which shows the same"
        )
    renderer = load_renderer(config.base, config.data.chat_template(), emit)
    data = at_most(learned_positions(meta_model(config.base)), config.data, emit)
    found = load_examples(data.train, data, renderer, emit)
    samples = [tokens_shown(renderer.tokenizer, e) for e in found.items[:examples]]
    return {"train": found.report.as_json(), "samples": samples}
