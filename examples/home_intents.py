"""Home commands to JSON intents: SmolLM2 before and after, on sentences of templates that it never saw.

python examples/home_intents.py [TRAINING SENTENCES] [HELD-OUT SENTENCES]
"""

import sys
from pathlib import Path

from twofold.adapter.attach import disabled
from twofold.base.load import DEFAULT_BASE
from twofold.data import home_intents
from twofold.data.examples import DataConfig
from twofold.events import silent
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.intents import ask
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import train
from twofold.training.optim import TrainingConfig

count, held_out = (int(a) for a in (*sys.argv[1:3], *("512", "100")[len(sys.argv[1:3]) :]))
folder = Path("runs/home-intents-data")
data = home_intents.write(folder, count, held_out)

report = train(
    TrainConfig(
        data=DataConfig(train=str(folder / "train.jsonl"), evaluation=str(folder / "evaluation.jsonl")),
        training=TrainingConfig(learning_rate=2e-3),
        output="runs/home-intents",
    )
)

base = load_with_adapters(DEFAULT_BASE, [report["adapter"]])
questions = [row["messages"][:-1] for row in data.evaluation]
expected = [row["messages"][-1]["content"] for row in data.evaluation]
after = ask("after", base, questions, expected, silent)
with disabled(base.model):
    before = ask("before", base, questions, expected, silent)
for found in (before, after):
    print(f"{found.name:<7} intent {found.intent_exact:.3f}   whole JSON {found.whole_exact:.3f}")
for i in range(3):
    print(
        f"\n{questions[i][-1]['content']}\n  before    {before.texts[i]!r}\n  after     {after.texts[i]}\n  expected  {expected[i]}"
    )
