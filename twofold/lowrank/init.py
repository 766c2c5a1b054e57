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


STARTS: dict[bool | str, Callable[[int, int, int], Factors]] = {True: kaiming, "gaussian": gaussian}
"""By the values that ``init_lora_weights`` may take."""
