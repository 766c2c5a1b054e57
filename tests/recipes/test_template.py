"""A run with a chat template of its own: the adapter carries it, and fits the base that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_base import CHATML

from twofold.adapter.files import open_adapter
from twofold.data.examples import DataConfig
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import train
from twofold.training.optim import TrainingConfig

pytest_plugins = ("tiny_fixtures",)


def test_a_template_of_ones_own_is_kept_with_the_adapter(llama_base: Path, tmp_path: Path) -> None:
    template = CHATML.replace("\\n{{ m['content'] }}", ": {{ m['content'] }}")
    (tmp_path / "own.jinja").write_text(template)
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("red", "green", "blue", "black")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        base=str(llama_base),
        data=DataConfig(train=str(tmp_path / "train.jsonl"), template=str(tmp_path / "own.jinja")),
        training=TrainingConfig(max_steps=2, learning_rate=1e-2),
        output=str(tmp_path / "run"),
        dtype="float32",
    )
    train(config)
    kept = open_adapter(tmp_path / "run" / "adapter").provenance
    assert kept is not None
    assert kept.chat_template == template
    base = load_with_adapters(str(llama_base), [str(tmp_path / "run" / "adapter")], "float32", "cpu")
    assert base.renderer.template == template
