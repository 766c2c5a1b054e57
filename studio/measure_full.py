"""Why low rank is enough: the update of a full fine-tuning, taken apart.

python studio/measure_full.py           (about twenty minutes on one core, 5 GB)

Every linear weight of SmolLM2-135M-Instruct learns freely, without factors, to turn home commands into JSON intents. Then the
update of each, W' - W, is cut to the best one of rank 0, 1, 2, 4, ... and the loss on sentences of templates that training never
saw is measured at each rank, beside the singular values themselves. Embeddings and norms stay frozen, so that nothing else
changes.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twofold.base.batch import Example
from twofold.base.load import DEFAULT_BASE, Base, load_base
from twofold.data import home_intents
from twofold.data.batches import evaluation_batches, micro_batches, step_indices
from twofold.data.examples import DataConfig, load_examples
from twofold.recipes.proof import pad_token
from twofold.training.objective import PlainObjective, evaluate_loss

MEASURED = Path(__file__).parent / "src" / "lesson" / "measured-full.json"
STEPS, BATCH, RATE, WARMUP = 64, 16, 1e-4, 5
RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 576)
SHOWN = (
    "layers.11.self_attn.q_proj",
    "layers.19.self_attn.v_proj",
    "layers.19.mlp.gate_proj",
    "layers.27.mlp.down_proj",
)


class Taken(NamedTuple):
    """A weight as it was, and the singular value decomposition of what training added."""

    weight: Tensor
    U: Tensor
    values: Tensor
    Vh: Tensor

    def at(self, r: int) -> Tensor:
        return self.weight + (self.U[:, :r] * self.values[:r]) @ self.Vh[:r]


def main() -> None:
    base = load_base(DEFAULT_BASE, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        home_intents.write(Path(folder), 1024, 210)
        config = DataConfig(train=str(Path(folder) / "train.jsonl"))
        learned = load_examples(config.train, config, base.renderer).items
        held_out = load_examples(str(Path(folder) / "evaluation.jsonl"), config, base.renderer).items
    linears = {n: m for n, m in base.model.named_modules() if isinstance(m, nn.Linear) and "layers." in n}
    before = {n: m.weight.detach().clone() for n, m in linears.items()}
    train(base, [m.weight for m in linears.values()], learned)
    with torch.no_grad():
        taken = {n: taken_apart(before[n], m.weight) for n, m in linears.items()}
        losses = [[r, loss_at(r, base, linears, taken, held_out)] for r in RANKS]
    MEASURED.write_text(json.dumps(found(losses, taken, len(held_out)), indent=None, separators=(",", ":")) + "\n")


def train(base: Base, weights: list[nn.Parameter], examples: Sequence[Example]) -> None:
    for weight in weights:
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        chosen = [examples[i] for i in step_indices(len(examples), BATCH, 0, step)]
        for batch in micro_batches(chosen, None, None):
            found = objective(base)(batch)
            (found.loss_sum / batch.supervised_tokens).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        print(f"step {step + 1}: loss {found.loss_sum.item() / batch.supervised_tokens:.3f}", flush=True)
    for weight in weights:
        weight.requires_grad_(False)


def objective(base: Base) -> PlainObjective:
    return PlainObjective(base.model, pad_token(base), "the model's own forward")


def taken_apart(before: Tensor, after: Tensor) -> Taken:
    return Taken(before, *torch.linalg.svd(after - before, full_matrices=False))


def loss_at(
    r: int, base: Base, linears: dict[str, nn.Linear], taken: dict[str, Taken], examples: Sequence[Example]
) -> float:
    """Held-out loss with the update of every weight cut to rank r."""
    for name, linear in linears.items():
        linear.weight.copy_(taken[name].at(r))
    loss = evaluate_loss(objective(base), evaluation_batches(examples, 2048)).loss
    print(f"rank {r}: held-out loss {loss:.4f}", flush=True)
    return round(loss, 4)


def found(losses: list[list[float]], taken: dict[str, Taken], sentences: int) -> dict[str, object]:
    kept = {r: mean_energy(r, taken) for r in RANKS}
    return {
        "base": "SmolLM2-135M-Instruct",
        "steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "held_out_sentences": sentences,
        "loss_by_rank": losses,
        "energy_by_rank": [[r, round(share, 4)] for r, share in kept.items()],
        "modules": [spectrum(name, one) for n in SHOWN for name, one in taken.items() if name.endswith(n)],
    }


def mean_energy(r: int, taken: dict[str, Taken]) -> float:
    """The share of all weights' squared Frobenius norms that the first r directions of each hold."""
    whole = sum(float(t.values.double().square().sum()) for t in taken.values())
    return sum(float(t.values[:r].double().square().sum()) for t in taken.values()) / whole


def spectrum(name: str, taken: Taken) -> dict[str, object]:
    return {
        "name": name.removeprefix("model."),
        "shape": list(taken.weight.shape),
        "values": [float(f"{v:.3g}") for v in taken.values.tolist()],
    }


if __name__ == "__main__":
    main()
