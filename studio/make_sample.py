"""The small trained adapter that ships with the studio, and what it loses at each smaller rank.

python studio/make_sample.py            (about six minutes on one core)

SmolLM2-135M-Instruct learns to turn home commands into JSON intents, by LoRA of rank 16 on every linear layer of four of its
thirty blocks. The factors are kept in bfloat16, 1.3 MB. Then every module is cut to the best update of rank 15, 14, ... 0,
and the loss on sentences of templates that training never saw is measured at each.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from twofold.adapter.attach import detach
from twofold.adapter.files import TENSORS, load_adapter
from twofold.base.load import DEFAULT_BASE, Base, load_base
from twofold.data import home_intents
from twofold.data.examples import DataConfig, Examples, load_examples
from twofold.events import Evaluated, Event, Message, Step, Warned
from twofold.merging.resize import Size
from twofold.recipes.resize import resize
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.train import held_out_loss, train
from twofold.tensorfile import TensorFile, write_tensors
from twofold.training.optim import TrainingConfig

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "twofold" / "studio" / "sample" / "home-intents"
MEASURED = HERE / "src" / "lesson" / "measured-sample.json"
LAYERS = (3, 11, 19, 27)
RANKS = (0, 1, 2, 3, 4, 6, 8, 12, 16)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        home_intents.write(work / "data", 1024, 210)
        report = train(settings(work), told)
        keep(Path(report["adapter"]))
        base = load_base(DEFAULT_BASE)
        examples = load_examples(
            str(work / "data" / "evaluation.jsonl"), DataConfig(train=str(work / "data" / "train.jsonl")), base.renderer
        )
        losses = {r: loss_at(r, base, examples, work) for r in RANKS}
    MEASURED.write_text(json.dumps(found(report, losses, len(examples.items)), indent=1) + "\n")


def settings(work: Path) -> TrainConfig:
    return TrainConfig(
        base=DEFAULT_BASE,
        adapter=AdapterSettings(r=16, lora_alpha=32, target_modules="all-linear", layers_to_transform=LAYERS),
        data=DataConfig(train=str(work / "data" / "train.jsonl"), evaluation=str(work / "data" / "evaluation.jsonl")),
        training=TrainingConfig(learning_rate=2e-3),
        output=str(work / "run"),
    )


def keep(adapter: Path) -> None:
    """The adapter's folder with its factors in bfloat16."""
    shutil.rmtree(SAMPLE, ignore_errors=True)
    shutil.copytree(adapter, SAMPLE)
    file = TensorFile(adapter / TENSORS)
    write_tensors(SAMPLE / TENSORS, {key: file.read(key).to(torch.bfloat16) for key in file.shapes})


def loss_at(r: int, base: Base, examples: Examples, work: Path) -> float:
    """Held-out loss of the kept adapter with every module cut to rank r; of the base for r = 0."""
    if r:
        resize(SAMPLE, work / f"r{r}", Size(r=r))
        load_adapter(base.model, work / f"r{r}")
    loss = held_out_loss(base, examples).loss
    if r:
        detach(base.model)
    print(f"rank {r}: held-out loss {loss:.4f}", flush=True)
    return loss


def found(report: dict[str, Any], losses: dict[int, float], sentences: int) -> dict[str, Any]:
    return {
        "base": "SmolLM2-135M-Instruct",
        "task": "home commands to JSON intents",
        "layers": list(LAYERS),
        "r": 16,
        "lora_alpha": 32,
        "learning_rate": 2e-3,
        "steps": report["steps"],
        "trained_sentences": 1024,
        "held_out_sentences": sentences,
        "loss_by_rank": [[r, round(loss, 4)] for r, loss in losses.items()],
    }


def told(event: Event) -> None:
    if isinstance(event, Step | Evaluated | Warned | Message):
        print(event, flush=True)


if __name__ == "__main__":
    main()
