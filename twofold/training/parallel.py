"""Training in several processes: every one holds the same factors, and adds its share of a step's gradient.

Gradients of adapters are megabytes, so they travel at the end of a step in one flat sum, whichever way the base is held:
whole in every process, or sharded over them (`twofold/base/sharded.py`). Why not DistributedDataParallel: docs/decisions/008.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from twofold.world import World


@torch.no_grad()
def start_alike(tensors: Iterable[Tensor], world: World) -> None:
    """Begin with rank 0's values everywhere: machines of another kind might draw or compute others from the same seed."""
    for tensor in tensors:
        world.copy_from_main(tensor.data)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Give every process the sum of all processes' gradients.

    A parameter that no process used keeps no gradient, as in a single process, so that the optimiser leaves it alone.
    """
    if world.size == 1:
        return
    held = list(parameters)
    used = world.sum_tensor(torch.tensor([float(p.grad is not None) for p in held], device=held[0].device))
    reached = [p for p, count in zip(held, used.tolist(), strict=True) if count]
    if not reached:
        return
    flat = world.sum_tensor(torch.cat([_gradient(p).flatten() for p in reached]))
    for parameter, total in zip(reached, flat.split([p.numel() for p in reached]), strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def draw_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's dropout: a function of step and rank, so that no generator's state need be kept."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=4).digest())
