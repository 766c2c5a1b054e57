"""What single techniques of training give, each beside doing without it, on SmolLM2 and home intents.

    python benchmarks/techniques.py                              all of them
    python benchmarks/techniques.py --only filler optimiser

filler: rows that belong to no example, of those that are computed, in one epoch of each case; and with every example padded to the
longest of its batch, as others do. optimiser: one step of AdamW over the 420 factors of r = 16, as they lie, beside one over the
same values in a single tensor, and one factor after the other. frozen: seconds a step in which the lower 20 of 30 layers are
frozen, their states remembered or not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from cases import CASES, Sizes
from grouped import microseconds

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.base.batch import pack
from twofold.base.load import DEFAULT_BASE, load_base, load_renderer
from twofold.data.batches import step_indices, steps_per_epoch
from twofold.data.examples import DataConfig, load_examples
from twofold.events import Step
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.train import train
from twofold.training.layout import lay_out
from twofold.training.optim import TrainingConfig, optimiser

SIZES = Sizes(examples=128, held_out=32, steps=8)
UPPER = tuple(range(20, 30))


def filler(folder: Path) -> None:
    for name in ("home-intents", "king-james", "raw-loop"):
        case, data = CASES[name], folder / name
        case.write(data, SIZES)
        source = str(data / "train.jsonl")
        examples = load_examples(source, DataConfig(train=source), load_renderer(DEFAULT_BASE)).items
        steps = range(steps_per_epoch(len(examples), case.batch))
        batches = [pack([examples[i] for i in step_indices(len(examples), case.batch, 0, s)]) for s in steps]
        laid = [lay_out(batch, share=True) for batch in batches]
        rows, used = sum(one.rows for one in laid), sum(one.computed for one in laid)
        padded, tokens = sum(len(b.lengths) * max(b.lengths) for b in batches), sum(b.tokens for b in batches)
        print(
            f"{name}: {rows:,} rows, filler {1 - used / rows:.1%}; {tokens:,} tokens padded to {padded:,}, filler "
            f"{1 - tokens / padded:.1%}",
            flush=True,
        )


def adamw(folder: Path) -> None:
    model = load_base(DEFAULT_BASE, "bfloat16", "cpu").model
    attach(model, LoraConfig(r=16))
    config = TrainingConfig()
    learned = [p for p in model.parameters() if p.requires_grad]
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in learned]))
    for p in (*learned, flat):
        p.grad = torch.randn_like(p)
    settings = {"lr": config.learning_rate, "fused": True}
    ways = {
        f"{len(learned)} tensors in one pass": optimiser(model, config).step,
        "one tensor of all values": torch.optim.AdamW([flat], **settings).step,
        "one tensor after the other": torch.optim.AdamW(learned, lr=config.learning_rate, foreach=False).step,
    }
    for name, step in ways.items():
        print(f"AdamW, {name}: {microseconds(step) / 1e3:.2f} ms a step", flush=True)


def frozen(folder: Path) -> None:
    data = folder / "upper"
    CASES["home-intents"].write(data, SIZES)
    config = TrainConfig(
        data=DataConfig(train=str(data / "train.jsonl")),
        adapter=AdapterSettings(layers_to_transform=UPPER),
        training=TrainingConfig(epochs=2, learning_rate=1e-3, checkpoint_every=None),
        verify=False,
    )
    for remembered in (False, True):
        training = replace(config.training, cache_frozen=remembered)
        steps: list[Step] = []
        report = train(
            replace(config, training=training, output=str(folder / f"run-{remembered}")),
            lambda event, to=steps: to.append(event) if isinstance(event, Step) else None,
        )
        epochs = steps[: len(steps) // 2], steps[len(steps) // 2 :]
        seconds = " and ".join(f"{statistics.median(s.seconds for s in epoch):.2f}" for epoch in epochs)
        how = "remembered" if remembered else "computed again"
        print(
            f"{len(UPPER)} of 30 layers learn, the lower ones {how}: {seconds} s a step in the two epochs, last loss "
            f"{steps[-1].loss:.4f}, peak {report['peak_memory_bytes'] / 1e9:.2f} GB",
            flush=True,
        )


TECHNIQUES: dict[str, Callable[[Path], None]] = {"filler": filler, "optimiser": adamw, "frozen": frozen}


def main(names: Sequence[str]) -> None:
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            TECHNIQUES[name](Path(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TECHNIQUES, default=list(TECHNIQUES))
    main(parser.parse_args().only)
