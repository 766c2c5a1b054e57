"""`twofold preview`: the data as the model will see it, without loading the model."""

from __future__ import annotations

from typing import Any

from twofold.base.load import load_renderer
from twofold.data.examples import load_examples
from twofold.events import Emit, silent
from twofold.recipes.preflight import tokens_shown
from twofold.recipes.settings import TrainConfig


def preview(config: TrainConfig, examples: int, emit: Emit = silent) -> dict[str, Any]:
    """The account of the training data, and its first examples token by token.

    Raises:
        UserError: the base's tokenizer or the data cannot be read.
    """
    renderer = load_renderer(config.base, config.data.chat_template(), emit)
    found = load_examples(config.data.train, config.data, renderer, emit)
    samples = [tokens_shown(renderer.tokenizer, e) for e in found.items[:examples]]
    return {"train": found.report.as_json(), "samples": samples}
