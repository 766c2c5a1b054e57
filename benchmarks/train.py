"""One epoch of home intents: Twofold against TRL + PEFT, side by side in one run.

Each side is a process of its own with the same base, type, rank, targets, batch, rate, schedule and sentences; they run in
turn, never at once. Both adapters are then judged by one and the same evaluation (PEFT's format is common ground).

    python benchmarks/train.py [--examples 512] [--rounds 1] [--dtype bfloat16]

Prints examples/s, tokens/s, peak memory and held-out loss of each side, and the ratios. `--side` is how it calls itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BASE = "smollm2-135m-instruct"
RANK, ALPHA, RATE, BATCH = 16, 32, 1e-3, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(data: Path, output: Path, dtype: str) -> dict[str, Any]:
    """Train with Twofold; the time is that of the steps."""
    from twofold.data.examples import DataConfig
    from twofold.recipes.settings import AdapterSettings, TrainConfig
    from twofold.recipes.train import train
    from twofold.training.optim import TrainingConfig

    config = TrainConfig(
        base=BASE,
        data=DataConfig(train=str(data / "train.jsonl")),
        adapter=AdapterSettings(r=RANK, lora_alpha=ALPHA),
        training=TrainingConfig(batch_size=BATCH, learning_rate=RATE, schedule="cosine", warmup=0.0),
        output=str(output),
        dtype=dtype,  # type: ignore[arg-type]
        verify=False,
    )
    report = train(config)
    keys = ("seconds", "tokens", "supervised_tokens", "peak_memory_bytes")
    return {**{k: report[k] for k in keys}, "adapter": report["adapter"]}


def theirs(data: Path, output: Path, dtype: str) -> dict[str, Any]:
    """Train with TRL's SFTTrainer and PEFT, completion-only, on the very tokens and masks of the other side."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from twofold.base.load import load_renderer, locate
    from twofold.data.examples import DataConfig, load_examples
    from twofold.machine import peak_memory_bytes

    folder = locate(BASE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    config = DataConfig(train=str(data / "train.jsonl"))
    examples = load_examples(config.train, config, load_renderer(BASE)).items
    rows = Dataset.from_list(
        [{"input_ids": e.token_ids, "completion_mask": [int(s) for s in e.supervised]} for e in examples]
    )
    settings = SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        completion_only_loss=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        seed=0,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    peft = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=peft,
    )

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Times the steps alone, as on the other side."""

        seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds += time.perf_counter() - self.started

    clock = Clock()
    trainer.add_callback(clock)
    supervised = sum(
        sum(t != -100 for t in b["labels"][:, 1:].flatten().tolist()) for b in trainer.get_train_dataloader()
    )
    trainer.train()
    peak = peak_memory_bytes(torch.device("cpu"))
    trainer.save_model(str(output / "adapter"))
    tokens = sum(len(r["input_ids"]) for r in trainer.train_dataset)
    return {
        "seconds": clock.seconds,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "peak_memory_bytes": peak,
        "adapter": str(output / "adapter"),
    }


def held_out_loss(adapter: str, data: Path) -> float:
    """The one judge of both adapters: float32, on the held-out sentences."""
    from twofold.data.examples import DataConfig
    from twofold.recipes.adapters import load_with_adapters
    from twofold.recipes.evaluate import evaluate

    base = load_with_adapters(BASE, [adapter], "float32")
    return float(evaluate(base, DataConfig(train=str(data / "evaluation.jsonl")))["loss"])


def in_own_process(side: str, data: Path, output: Path, dtype: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--data", str(data), "--output", str(output), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--side", choices=["ours", "theirs"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.side:
        print(json.dumps({"ours": ours, "theirs": theirs}[given.side](given.data, given.output, given.dtype)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), given)


def compare(folder: Path, given: argparse.Namespace) -> None:
    from twofold.data.home_intents import write

    data = folder / "data"
    write(data, given.examples, given.held_out)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for i in range(given.rounds):
        for side, found in runs.items():
            found.append(in_own_process(side, data, folder / f"{side}-{i}", given.dtype))
            print(f"  round {i + 1}, {side}: {json.dumps(found[-1])}", file=sys.stderr)
    rows = {side: summary(found, given.examples, data) for side, found in runs.items()}
    print(f"{'':<22}{'Twofold':>14}{'TRL + PEFT':>14}{'ratio':>10}")
    for key in rows["ours"]:
        a, b = rows["ours"][key], rows["theirs"][key]
        print(f"{key:<22}{a:>14,.3f}{b:>14,.3f}{a / b:>10.2f}")


def summary(found: list[dict[str, Any]], examples: int, data: Path) -> dict[str, float]:
    seconds = statistics.median(f["seconds"] for f in found)
    return {
        "examples/s": examples / seconds,
        "tokens/s": found[0]["tokens"] / seconds,
        "tokens": found[0]["tokens"],
        "supervised tokens": found[0]["supervised_tokens"],
        "peak memory, GB": max(f["peak_memory_bytes"] for f in found) / 1e9,
        "held-out loss": held_out_loss(found[0]["adapter"], data),
    }


if __name__ == "__main__":
    main()
