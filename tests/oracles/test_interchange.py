"""What PEFT writes, Twofold reads, and the other way round: the same outputs, kind by kind, or the sentence that says why not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import torch
from families import logits, randomise, token_ids
from interchange_cases import CASES, Case
from torch import nn

from twofold.adapter.attach import attach, shares
from twofold.adapter.files import load_adapter, save_adapter
from twofold.base.batch import Example
from twofold.errors import UserError
from twofold.peft import LoraConfig
from twofold.recipes.starts import loftq_start, started

KINDS = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def move(model: Any) -> None:
    """Everything that learns goes on from its start."""
    learned = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    before = {n: p.detach().clone() for n, p in learned}
    randomise(learned, scale=0.1)
    with torch.no_grad():
        for name, parameter in learned:
            parameter.add_(before[name])


def settings(case: Case) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, **case.settings}


# ---------------------------------------------------------------------------------------------- in PEFT


def in_peft(case: Case) -> Any:
    """PEFT's model with a fresh adapter, by the steps that each start takes there."""
    torch.manual_seed(5)
    base, config = case.build(), {**settings(case), **dict.fromkeys(case.words)}
    if case.start == "loftq":
        config["init_lora_weights"] = True
    if case.start == "lora_ga":
        told = peft.LoraConfig(**config, lora_ga_config=peft.LoraGAConfig())
        peft.preprocess_loraga(base, told, lambda: logits(base).square().mean().backward())
    elif case.start == "corda":
        told = peft.LoraConfig(**config)
        leave_eigens(base, told)
    else:
        told = peft.LoraConfig(**config)
    model = peft.get_peft_model(base, told).eval()
    for name, value in case.words.items():
        setattr(told, name, value)
    if case.start == "eva":
        batches = [{"input_ids": token_ids(4, 16, seed=i), "attention_mask": torch.ones(4, 16)} for i in range(2)]
        peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def leave_eigens(base: nn.Module, config: Any) -> None:
    """As peft's `preprocess_corda` does, which needs the package attrs, of inputs whose covariance is one."""
    for name, module in base.named_modules():
        if name.endswith(tuple(config.target_modules)):
            U, S, Vh = torch.linalg.svd(cast(Any, module).weight.detach(), full_matrices=False)
            r = config.r
            cast(Any, module).eigens = SimpleNamespace(S_WC=S[:r], U_WC=U[:, :r], V_WC=Vh[:r].T)


def save_start(model: Any, path: Path) -> None:
    """As PEFT wants it for a later conversion: under a config that says nothing of the start."""
    config = model.peft_config["default"]
    start, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(path)
    config.init_lora_weights = start


@contextmanager
def refused(sentence: str) -> Iterator[None]:
    """Either nothing, or an error with this sentence in it."""
    if not sentence:
        yield
        return
    with pytest.raises(UserError, match=re.escape(sentence)):
        yield


@KINDS
def test_what_peft_writes_gives_the_same_outputs_here(case: Case, tmp_path: Path) -> None:
    theirs = in_peft(case)
    if case.converted:
        save_start(theirs, tmp_path / "start")
    move(theirs)
    ours = case.build()
    bare = case.run(ours)
    expected = case.run(theirs)
    conversion = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")} if case.converted else {}
    theirs.save_pretrained(tmp_path / "a", **conversion)
    with refused(case.refused_read):
        load_adapter(ours, tmp_path / "a")
    if case.refused_read:
        return
    if case.doubled:
        double_out(ours)
    torch.testing.assert_close(case.run(ours), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(bare, expected, atol=1e-3), "the adapter should change something"


# ---------------------------------------------------------------------------------------------- here


def attached_here(case: Case, model: Any) -> None:
    """A fresh adapter of ours, by the steps that each start takes here."""
    config = LoraConfig(**settings(case)).for_model(model)
    examples = [Example(row.tolist(), [True] * 16) for row in token_ids(8, 16)]
    factors = None
    if case.start == "loftq":
        weights = {n: m.weight.detach() for n, m in model.named_modules() if n.endswith(tuple(config.target_modules))}
        factors = loftq_start(model, config, weights, lambda weight: (weight * 8).round() / 8)
    elif case.start in ("eva", "lora_ga"):
        config, factors = started(model, config, examples, 0, source="")
    attach(model, config, factors=factors)


@KINDS
def test_what_we_write_gives_the_same_outputs_in_peft(case: Case, tmp_path: Path) -> None:
    ours = case.build()
    with refused(case.refused_written):
        attached_here(case, ours)
    if case.refused_written:
        return
    move(ours)
    save_adapter(ours, tmp_path / "a")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(case.build(), tmp_path / "a").eval()
    assert not [str(w.message) for w in said if "key" in str(w.message)]
    if case.doubled:
        double_out(ours)
    torch.testing.assert_close(case.run(theirs), case.run(ours), rtol=1e-4, atol=1e-4)


def double_out(model: Any) -> None:
    """PEFT adds the update of the output projection twice, ours once: a doubled B stands for it."""
    (share,) = shares(model, "default").values()
    share.out.B.data.mul_(2)  # type: ignore[union-attr]
