"""A whole training over the fast path learns what one over the model's own forward learns."""

from __future__ import annotations

import pytest
import torch
from families import VOCABULARY, randomise
from tiny_base import llama
from torch import Tensor, nn

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.base.batch import Example, PackedBatch, pack
from twofold.base.blocks import NotDescribed
from twofold.training.objective import FastObjective, Objective, PlainObjective, objective_for, plain_objective

STEPS = 200
PROMPT = list(range(4, 16))


def batches() -> list[PackedBatch]:
    """A task that can be learned: after a prompt that all share, every second token is the one before it, plus one."""
    draw, found = torch.Generator().manual_seed(1), []
    for _ in range(20):
        examples = []
        for _ in range(4):
            words = torch.randint(16, VOCABULARY - 1, (4,), generator=draw).tolist()
            ids = [*PROMPT, *(t for w in words for t in (w, w + 1))]
            examples.append(Example(ids, [i >= len(PROMPT) and i % 2 == 1 for i in range(len(ids))]))
        found.append(pack(examples))
    return found


def curve(path: type[Objective], dtype: torch.dtype) -> Tensor:
    """The loss per token of every step."""
    model = llama(VOCABULARY).to(dtype)
    attach(model, LoraConfig(r=8, lora_alpha=16))
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype is torch.float32 for p in factors.values())
    randomise([(n, p) for n, p in factors.items() if n.endswith("A")], scale=0.2)
    objective = (
        objective_for(model, 0, recompute=False)
        if path is FastObjective
        else plain_objective(model, 0, NotDescribed("asked for"), recompute=False)
    )
    assert isinstance(objective, path)
    return trained(objective, list(factors.values()))


def trained(objective: Objective, parameters: list[nn.Parameter]) -> Tensor:
    optimiser, data, losses = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0), batches(), []
    for step in range(STEPS):
        batch = data[step % len(data)]
        loss = objective(batch).loss_sum / batch.supervised_tokens
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.fixture(scope="module")
def truth() -> Tensor:
    """The plain path's curve in float32."""
    return curve(PlainObjective, torch.float32)


@pytest.mark.slow
def test_in_float32_both_paths_learn_alike_step_by_step(truth: Tensor) -> None:
    assert truth[-20:].mean() < 0.8 * truth[:20].mean(), "or nothing is shown"
    torch.testing.assert_close(curve(FastObjective, torch.float32), truth, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_in_bfloat16_the_fast_path_is_as_near_the_truth_as_the_plain_one(truth: Tensor) -> None:
    """The noise of bfloat16 is the plain path's own distance from float32."""
    off = {path: (curve(path, torch.bfloat16) - truth).abs().mean() for path in (FastObjective, PlainObjective)}
    assert off[FastObjective] < 1.5 * off[PlainObjective] + 1e-3, off
