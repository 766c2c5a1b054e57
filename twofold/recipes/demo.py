"""`twofold demo`: the main job on the embedded default, end to end, on real data.

SmolLM2-135M-Instruct learns to turn home commands into JSON intents. What it is asked at the end are sentences from
templates that no training sentence came from. The base is asked the same, and once more with every intent's name and
three examples in its prompt, so that the comparison is fair.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from twofold import atomic
from twofold.adapter.attach import disabled
from twofold.base.chat import Message
from twofold.base.load import BUILT_IN, DEFAULT_BASE, Base, locate
from twofold.data import home_intents
from twofold.data.examples import DataConfig, load_examples
from twofold.errors import RunError
from twofold.events import Emit, silent
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.intents import ask
from twofold.recipes.merge import merge_checkpoint
from twofold.recipes.proof import both_logits, compare, pad_token, proof_batch
from twofold.recipes.report import write_page
from twofold.recipes.runs import RunFolder
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import train
from twofold.training.optim import TrainingConfig

SHOWN = 5
HINTED = "base, with intents and 3 examples in its prompt"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demonstration.

    Attributes:
        output: the run folder.
        examples: training sentences.
        held_out: sentences of held-out templates to ask at the end.
        seed: of the data, the start and the order.
    """

    output: str = "runs/demo"
    examples: int = 1024
    held_out: int = 210
    seed: int = 0


def demo(config: DemoConfig, emit: Emit = silent) -> dict[str, Any]:
    """Data, training, questions, proofs, merge; returns what report.json holds.

    Raises:
        RunError: the output holds a run already.
    """
    run = RunFolder(Path(config.output))
    if run.path.exists():
        raise RunError(f"{run.path} exists already; remove it or choose another --output")
    data = home_intents.write(run.path / "data", config.examples, config.held_out, config.seed, emit)
    settings = train_config(config, run)
    report = train(settings, emit)
    base = load_with_adapters(DEFAULT_BASE, [str(run.adapter)], settings.dtype, settings.device, emit)
    report["task"] = task(base, data, emit)
    examples = load_examples(str(run.path / "data" / "evaluation.jsonl"), settings.data, base.renderer).items
    report["peft"] = peft_parity(base, run.adapter, examples)
    report["merge"] = merge_checkpoint(base, run.path / "merged", examples, emit)
    report["sizes"] = {"adapter": size(run.adapter), "merged": size(run.path / "merged")}
    atomic.write_json(run.report, report)
    write_page(run.page, report, json.loads(run.preflight.read_text()), run.recorded())
    return report


def train_config(config: DemoConfig, run: RunFolder) -> TrainConfig:
    """The demonstration's training, which its config.yaml then holds."""
    data = run.path / "data"
    return TrainConfig(
        base=DEFAULT_BASE,
        data=DataConfig(train=str(data / "train.jsonl"), evaluation=str(data / "evaluation.jsonl")),
        training=TrainingConfig(learning_rate=2e-3, checkpoint_every=25, seed=config.seed),
        output=config.output,
    )


def task(base: Base, data: home_intents.HomeIntents, emit: Emit) -> dict[str, Any]:
    """Base and adapter on the held-out sentences, scored and side by side."""
    rows = [row["messages"] for row in data.evaluation]
    expected = [row[-1]["content"] for row in rows]
    asked = [row[:-1] for row in rows]
    adapter = ask("adapter", base, asked, expected, emit)
    with disabled(base.model):
        plain = ask("base", base, asked, expected, emit)
        hinted = ask(HINTED, base, [[*hint(data), *row[1:]] for row in asked], expected, emit)
    return {
        "scores": [
            {"name": a.name, "intent_exact": a.intent_exact, "whole_exact": a.whole_exact, "sentences": len(rows)}
            for a in (plain, hinted, adapter)
        ],
        "samples": [
            {
                "prompt": asked[i][-1]["content"],
                "expected": expected[i],
                "base": plain.texts[i],
                "adapter": adapter.texts[i],
            }
            for i in range(0, len(rows), -(-len(rows) // SHOWN))
        ],
    }


def hint(data: home_intents.HomeIntents) -> list[Message]:
    """A system message that names all intents, and three training examples as turns before the question."""
    system = f"{home_intents.SYSTEM} The intents are: {', '.join(data.intents)}."
    shown = [m for row in data.train[:3] for m in row["messages"][1:]]
    return [{"role": "system", "content": system}, *shown]


def peft_parity(base: Base, adapter: Path, examples: list[Any]) -> dict[str, Any] | None:
    """The adapter here against the same folder in PEFT, on logits; None where PEFT is not installed."""
    if find_spec("peft") is None:
        return None
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(locate(base.reference), dtype=base.dtype).to(base.device)
    theirs = PeftModel.from_pretrained(fresh, str(adapter)).eval()
    batch = proof_batch(examples, base.device)
    found = compare(base.model, both_logits(theirs, batch, pad_token(base)), batch, pad_token(base))
    found.require("PEFT's own loading of the adapter")
    return found.as_json()


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def attribution() -> str:
    """Where base and data come from."""
    entry = BUILT_IN[DEFAULT_BASE]
    return f"{entry.hub_id} ({entry.licence}); home-assistant-intents (CC BY 4.0)"
