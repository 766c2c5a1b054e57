"""The starts: how A and B look before the first step.

Every start here has B = 0 (for embeddings A = 0), so that the adapted model equals the base at step 0. Values are
drawn on the CPU in float32 from torch's generator, so that one seed gives one start on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[Float[Tensor, "r in_"], Float[Tensor, "out r"]]
Start = Callable[[int, int, int], Factors]
"""From r, in and out to A and B."""


def kaiming(r: int, in_features: int, out_features: int) -> Factors:
    """A uniform in ±1/sqrt(in) (Kaiming with a = sqrt(5), as in the LoRA paper's code and PEFT), B zero."""
    bound = 1 / math.sqrt(in_features)
    return torch.empty(r, in_features).uniform_(-bound, bound), torch.zeros(out_features, r)


def gaussian(r: int, in_features: int, out_features: int) -> Factors:
    """A normal with standard deviation 1/r, B zero (PEFT's ``init_lora_weights="gaussian"``)."""
    return torch.randn(r, in_features) / r, torch.zeros(out_features, r)


def embedding(r: int, vocabulary: int, dim: int) -> Factors:
    """A (r, vocabulary) zero, B (dim, r) standard normal: rows of A are looked up, so A carries the zero."""
    return torch.zeros(r, vocabulary), torch.randn(dim, r)


def unfilled(r: int, in_features: int, out_features: int) -> Factors:
    """Factors of one value, repeated without memory of their own: the place of values that are read from a file."""
    return _NOTHING.expand(r, in_features), _NOTHING.expand(out_features, r)


_NOTHING = torch.zeros(())

STARTS: dict[bool | str, Start] = {True: kaiming, "gaussian": gaussian}
"""By the values that ``init_lora_weights`` may take."""
