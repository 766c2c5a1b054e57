"""The starts that are drawn: how A and B look before the first step, from their shapes alone.

Values are drawn on the CPU in float32 from torch's generator, so that one seed gives one start on every device. Those with
B = 0 (for embeddings A = 0) leave the adapted model equal to the base at step 0. Starts that read a weight, a gradient or
activations are in `spectral_init.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.errors import ConfigError

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


def both_random(r: int, in_features: int, out_features: int) -> Factors:
    """A and B uniform in ±1/sqrt(in) and ±1/sqrt(r): the model is not the base at step 0 (PEFT's ``False``, for tests)."""
    bound = 1 / math.sqrt(r)
    return kaiming(r, in_features, out_features)[0], torch.empty(out_features, r).uniform_(-bound, bound)


def orthogonal(r: int, in_features: int, out_features: int) -> Factors:
    """A and B random but with BA = 0: their ranks lie in halves of one orthogonal basis (PEFT's ``"orthogonal"``).

    With Q (r, r) orthogonal, A = (X Q_even)ᵀ / 10 and B = Y Q_odd / 10, so that B A = Y Q_odd Q_evenᵀ Xᵀ / 100 = 0 up to rounding.

    Raises:
        ConfigError: r is odd and has no halves.
    """
    if r % 2:
        raise ConfigError(f"init_lora_weights: orthogonal needs even ranks, but one is {r}")
    Q = torch.linalg.qr(torch.randn(r, r)).Q
    A = (torch.randn(in_features, r // 2) @ Q[0::2]).T / 10
    B = torch.randn(out_features, r // 2) @ Q[1::2] / 10
    return A.contiguous(), B


def embedding(r: int, vocabulary: int, dim: int) -> Factors:
    """A (r, vocabulary) zero, B (dim, r) standard normal: rows of A are looked up, so A carries the zero."""
    return torch.zeros(r, vocabulary), torch.randn(dim, r)


@cache
def unfilled(r: int, in_features: int, out_features: int) -> Factors:
    """Factors of one value, repeated without memory of their own: a place for a file's values."""
    return _NOTHING.expand(r, in_features), _NOTHING.expand(out_features, r)


_NOTHING = torch.zeros(())

STARTS: dict[bool | str, Start] = {
    True: kaiming,
    False: both_random,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
}
"""By the values that ``init_lora_weights`` may take."""
