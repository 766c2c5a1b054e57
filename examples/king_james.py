"""Modern English in the style of the King James Bible: SmolLM2 before and after, on books that it never saw.

Copying the modern verse already scores high in chrF, so what counts is the gain over copying, and the share of verses with an
archaic word in them.

python examples/king_james.py [TRAINING VERSES] [HELD-OUT VERSES]
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from twofold.adapter.attach import disabled
from twofold.base.load import DEFAULT_BASE
from twofold.data import king_james
from twofold.data.examples import DataConfig
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.generate import GenerationConfig, answers
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import train
from twofold.training.optim import TrainingConfig

ARCHAIC = re.compile(r"\b(?:thou|thee|thy|thine|ye|hath|doth|saith|unto|shalt|hast|wilt|\w+eth)\b", re.IGNORECASE)


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Character n-gram F2 over all verses, n from 1 to 6 (Popović, 2015), in percent."""
    precisions, recalls = [], []
    for n in range(1, 7):
        pairs = [(grams(a, n), grams(r, n)) for a, r in zip(answers, references, strict=True)]
        same = sum((a & r).total() for a, r in pairs)
        precisions.append(same / max(1, sum(a.total() for a, _ in pairs)))
        recalls.append(same / max(1, sum(r.total() for _, r in pairs)))
    p, r = sum(precisions) / 6, sum(recalls) / 6
    return 100 * 5 * p * r / (4 * p + r) if p + r else 0.0


def grams(text: str, n: int) -> Counter[str]:
    """The n-grams of a text without its spaces."""
    bare = "".join(text.split())
    return Counter(bare[i : i + n] for i in range(len(bare) - n + 1))


count, held_out = (int(a) for a in (*sys.argv[1:3], *("768", "60")[len(sys.argv[1:3]) :]))
folder = Path("runs/king-james-data")
data = king_james.write(folder, count, held_out)

report = train(
    TrainConfig(
        data=DataConfig(train=str(folder / "train.jsonl"), evaluation=str(folder / "evaluation.jsonl")),
        training=TrainingConfig(learning_rate=1e-3),
        output="runs/king-james",
    )
)

base = load_with_adapters(DEFAULT_BASE, [report["adapter"]])
questions = [row["messages"][:-1] for row in data.evaluation]
modern = [q[-1]["content"] for q in questions]
verses = [row["messages"][-1]["content"] for row in data.evaluation]
settings = GenerationConfig(max_new_tokens=96)
after = answers(base, questions, settings)
with disabled(base.model):
    before = answers(base, questions, settings)

copied = chrf(modern, verses)
print("               chrF   over copying   verses with an archaic word")
for name, said in (("copying", modern), ("before", before), ("after", after), ("King James", verses)):
    archaic = sum(bool(ARCHAIC.search(t)) for t in said) / len(said)
    print(f"{name:<12} {chrf(said, verses):6.1f}   {chrf(said, verses) - copied:+12.1f}   {archaic:.0%}")
for i in range(3):
    print(f"\n{modern[i]}\n  before      {before[i]!r}\n  after       {after[i]}\n  King James  {verses[i]}")
