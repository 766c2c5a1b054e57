"""One side of a comparison, trained in a process of its own: `python benchmarks/sides.py SIDE JOB`, both as JSON.

All sides train on the very same tokens and masks, with the same base, type, rank, targets, batch, rate and schedule, and
each times its steps alone. Each prints what it measured, and the folder of its adapter in PEFT's format.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twofold.base.batch import Example
from twofold.base.load import DEFAULT_BASE, load_renderer, locate
from twofold.data.batches import step_indices, steps_per_epoch
from twofold.data.examples import DataConfig, load_examples
from twofold.events import Event, Step
from twofold.machine import peak_memory_bytes
from twofold.training.optim import TrainingConfig, learning_rate

RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100
"""The label that transformers counts no loss for."""


@dataclass(frozen=True)
class Job:
    """One epoch over `data`/train.jsonl."""

    data: str
    output: str
    dtype: str
    batch: int
    share_prefixes: bool

    def data_config(self) -> DataConfig:
        return DataConfig(train=str(Path(self.data) / "train.jsonl"), max_length=8192)

    def training(self) -> TrainingConfig:
        """What both sides do, in Twofold's words."""
        return TrainingConfig(batch_size=self.batch, learning_rate=1e-3, warmup=0.0, share_prefixes=self.share_prefixes)

    def examples(self) -> list[Example]:
        config = self.data_config()
        return load_examples(config.train, config, load_renderer(DEFAULT_BASE)).items


def twofold(job: Job) -> dict[str, Any]:
    """`twofold train`."""
    from twofold.recipes.settings import AdapterSettings, TrainConfig
    from twofold.recipes.train import train

    config = TrainConfig(
        data=job.data_config(),
        adapter=AdapterSettings(r=RANK, lora_alpha=ALPHA),
        training=job.training(),
        output=job.output,
        dtype=job.dtype,  # type: ignore[arg-type]
        verify=False,
    )
    steps: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, Step):
            steps.append(event.seconds)

    report = train(config, hear)
    keys = ("tokens", "supervised_tokens", "peak_memory_bytes", "adapter")
    floor = report["floor"] and report["floor"]["fraction"]
    return {**{k: report[k] for k in keys}, "step_seconds": steps, "floor_fraction": floor}


def trl(job: Job) -> dict[str, Any]:
    """TRL's SFTTrainer with PEFT, completion-only."""
    from datasets import Dataset
    from trl import SFTTrainer

    examples = job.examples()
    rows = Dataset.from_list(
        [{"input_ids": e.token_ids, "completion_mask": [int(s) for s in e.supervised]} for e in examples]
    )
    trainer = SFTTrainer(
        model=_model(job),
        args=_trl_settings(job),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(locate(DEFAULT_BASE)),
        peft_config=_peft_config(),
    )
    clock = _clock()
    trainer.add_callback(clock)
    labels = [b["labels"][:, 1:] for b in trainer.get_train_dataloader()]
    trainer.train()
    peak = peak_memory_bytes(torch.device("cpu"))
    trainer.save_model(str(Path(job.output) / "adapter"))
    tokens = sum(len(r["input_ids"]) for r in trainer.train_dataset)
    return _measured(job, clock.seconds, tokens, labels, peak)


def _trl_settings(job: Job) -> Any:
    from trl import SFTConfig

    training = job.training()
    return SFTConfig(
        output_dir=job.output,
        per_device_train_batch_size=job.batch,
        num_train_epochs=1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=0,
        max_grad_norm=training.gradient_clip,
        max_length=None,
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


def _clock() -> Any:
    """A callback that times the steps alone, as the other sides do."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    return Clock()


def plain_loop(job: Job) -> dict[str, Any]:
    """The loop that anyone would write: the model's own loss of padded batches, backward, clip, AdamW."""
    from peft import get_peft_model

    examples, training = job.examples(), job.training()
    torch.manual_seed(training.seed)
    model = get_peft_model(_model(job), _peft_config()).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    seconds: list[float] = []
    labels: list[torch.Tensor] = []
    for step in range(steps := steps_per_epoch(len(examples), job.batch)):
        started = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(training, step, steps)
        chosen = step_indices(len(examples), job.batch, training.seed, step)
        batch = _padded([examples[i] for i in chosen])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, training.gradient_clip)
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - started)
        labels.append(batch["labels"][:, 1:])
    peak = peak_memory_bytes(torch.device("cpu"))
    model.save_pretrained(Path(job.output) / "adapter")
    return _measured(job, seconds, sum(len(e.token_ids) for e in examples), labels, peak)


def _padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Examples side by side, padded on the right, as a model of transformers takes them."""
    longest = max(len(e.token_ids) for e in examples)
    ids, mask, labels = torch.zeros(3, len(examples), longest, dtype=torch.long)
    labels.fill_(IGNORED)
    for i, example in enumerate(examples):
        row = i, slice(len(example.token_ids))
        ids[row], mask[row] = torch.tensor(example.token_ids), 1
        labels[row] = torch.where(torch.tensor(example.supervised), ids[row], IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _model(job: Job) -> Any:
    return AutoModelForCausalLM.from_pretrained(locate(DEFAULT_BASE), dtype=getattr(torch, job.dtype))


def _peft_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")


def _measured(job: Job, seconds: list[float], tokens: int, labels: list[torch.Tensor], peak: int) -> dict[str, Any]:
    return {
        "step_seconds": seconds,
        "tokens": tokens,
        "supervised_tokens": sum(int((t != IGNORED).sum()) for t in labels),
        "peak_memory_bytes": peak,
        "adapter": str(Path(job.output) / "adapter"),
    }


SIDES = {"Twofold": twofold, "TRL + PEFT": trl, "plain loop + PEFT": plain_loop}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](Job(**json.loads(sys.argv[2])))))
