"""transformers' Trainer over `twofold.peft`: it trains, saves what PEFT loads, and goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build_model, logits
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, TrainingArguments

import twofold.peft as face
from twofold.adapter.attach import attached
from twofold.errors import RunError
from twofold.peft import LoraConfig, get_peft_model

FILE = "adapter_model.safetensors"


def training(path: Path, **settings: Any) -> TrainingArguments:
    quiet: dict[str, Any] = {"report_to": [], "use_cpu": True, "logging_steps": 1, "disable_tqdm": True}
    return TrainingArguments(str(path), learning_rate=0.02, lr_scheduler_type="constant", **quiet, **settings)


def trainee() -> Any:
    base = face.prepare_model_for_kbit_training(
        build_model("llama"), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    torch.manual_seed(3)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"]))


ROWS: Any = [{"input_ids": torch.arange(i, i + 6) % 60, "labels": torch.arange(i, i + 6) % 60} for i in range(16)]


def test_trainer_trains_saves_and_peft_loads_the_checkpoint(tmp_path: Path) -> None:
    model = trainee()
    assert isinstance(model, PreTrainedModel)
    trainer = Trainer(model, training(tmp_path, max_steps=12, save_steps=6), train_dataset=ROWS)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    trainer.save_model(str(tmp_path))
    last = tmp_path / "checkpoint-12"
    assert {k: t.shape for k, t in load_file(last / FILE).items()} == {
        k: t.shape for k, t in load_file(tmp_path / FILE).items()
    }
    assert not list(tmp_path.rglob("model.safetensors"))
    theirs = peft.PeftModel.from_pretrained(build_model("llama"), last).eval()
    torch.testing.assert_close(logits(theirs), logits(model.eval()), rtol=1e-5, atol=1e-5)
    assert attached(model) == ["default"]


def test_our_trainer_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    whole, again = trainee(), trainee()
    face.Trainer(whole, training(tmp_path, max_steps=8, save_steps=4), train_dataset=ROWS).train()
    trainer = face.Trainer(again, training(tmp_path / "b", max_steps=8, save_steps=4), train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8
    assert torch.equal(logits(again.eval()), logits(whole.eval()))
    other = trainee()
    other.add_adapter("second", LoraConfig(r=2))
    with pytest.raises(RunError, match="holds no adapter 'second'"):
        face.Trainer(other, training(tmp_path / "c"), train_dataset=ROWS).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
