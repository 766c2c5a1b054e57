"""Training in a random subspace: theta = theta_0 + P z, with z, and with `layers` a factor for each layer, learned.

The model's parameters hold theta; their gradients are projected and dropped as soon as the backward pass has made them, so that no
more than one of them is alive.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twofold.base.batch import PackedBatch
from twofold.lowrank.subspace import KINDS, Kind, Projection
from twofold.training.objective import Objective
from twofold.training.optim import TrainingConfig, learning_rate
from twofold.training.parallel import draw_seed


@dataclass(frozen=True)
class Part:
    """One parameter: its start, its rows of P, and the number of its layer's factor."""

    parameter: nn.Parameter
    start: Tensor
    projection: Projection
    layer: int


class Subspace:
    """A model's parameters as a function of z and of the layers' factors.

    Attributes:
        z: (d,), zero at the start.
        factors: one a layer, one at the start; learned only with `layers` (arXiv 2012.13255, section 3.2: SAID).
    """

    def __init__(self, model: nn.Module, d: int, kind: Kind, seed: int, *, layers: bool) -> None:
        named = list(model.named_parameters())
        total = sum(p.numel() for _, p in named)
        names = layers_in(model)
        self.z, self.factors = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.ones(len(names)), requires_grad=layers)
        self.parts = [
            Part(p, p.detach().clone(), KINDS[kind].draw(p.numel(), d, total, seed + i), names.index(layer_of(name)))
            for i, (name, p) in enumerate(named)
        ]
        self.total = total

    def learned(self) -> list[nn.Parameter]:
        return [p for p in (self.z, self.factors) if p.requires_grad]

    @torch.no_grad()
    def place(self) -> None:
        """Put theta into the model."""
        for part in self.parts:
            moved = part.projection.apply(self.z).mul_(self.factors[part.layer])
            part.parameter.copy_(part.start + moved.view(part.start.shape).to(part.start.dtype))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the start back, bit for bit."""
        for part in self.parts:
            part.parameter.copy_(part.start)

    @contextmanager
    def projecting(self) -> Iterator[None]:
        """Within, gradients of the model go to z and the factors, and are gone."""
        self.z.grad, self.factors.grad = torch.zeros_like(self.z), torch.zeros_like(self.factors)
        handles = [p.parameter.register_post_accumulate_grad_hook(self._hook(p)) for p in self.parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, part: Part) -> Callable[[Tensor], None]:
        def project(parameter: Tensor) -> None:
            if parameter.grad is not None and self.z.grad is not None and self.factors.grad is not None:
                g = part.projection.transpose(parameter.grad.flatten().float())
                self.z.grad.add_(g, alpha=float(self.factors[part.layer].detach()))
                self.factors.grad[part.layer] += torch.dot(g, self.z.detach())
                parameter.grad = None

        return project


def layers_in(model: nn.Module) -> list[str]:
    """The layers of a model's parameters, in its order."""
    return list(dict.fromkeys(layer_of(name) for name, _ in model.named_parameters()))


def layer_of(name: str) -> str:
    """The layer of a parameter by its name; what lies in none is a layer of its own kind."""
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else name.partition(".")[0] + name.rpartition(".")[0]


def train_subspace(
    subspace: Subspace,
    objective: Objective,
    config: TrainingConfig,
    steps: int,
    batches: Callable[[int], Sequence[PackedBatch]],
    *,
    rate: float,
) -> list[float]:
    """AdamW over z and the factors, by the schedule of any training; the losses of the steps. The model then holds the last theta.

    Args:
        rate: the highest rate of z, in place of the configuration's; the factors, near one, learn by the configuration's own.
    """
    optimise = torch.optim.AdamW(
        [{"params": [p]} for p in subspace.learned()], betas=(config.beta1, config.beta2), weight_decay=0.0
    )
    losses = []
    for step in range(steps):
        share = learning_rate(config, step, steps) / config.learning_rate
        for group, highest in zip(optimise.param_groups, (rate, config.learning_rate), strict=False):
            group["lr"] = share * highest
        torch.manual_seed(draw_seed(config.seed, step, 0))
        losses.append(_gradient(subspace, objective, batches(step)))
        torch.nn.utils.clip_grad_norm_(subspace.learned(), config.gradient_clip or torch.inf)
        optimise.step()
        subspace.place()
    return losses


def _gradient(subspace: Subspace, objective: Objective, batches: Sequence[PackedBatch]) -> float:
    supervised = sum(b.supervised_tokens for b in batches)
    total = 0.0
    with subspace.projecting():
        for batch in batches:
            loss = objective(batch).loss_sum / supervised
            loss.backward()
            total += float(loss.detach())
    return total
