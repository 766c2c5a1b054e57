"""Is this the base that an adapter was trained on?

A fingerprint is the names and shapes of the parameters, as a digest, and sampled values, in the open: values can then be
compared with tolerance, so that the NF4 or GGUF form of a base still matches its 16-bit source, and a fine-tuned
sibling of the same shape does not match.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twofold.config import build
from twofold.errors import ForeignBaseError

TENSORS, VALUES = 48, 8
"""How many tensors are sampled, and how many values in each."""
QUANTISED_ERROR = 0.2
"""Relative error up to which samples may be a quantised form of one another: 4-bit formats stay near 0.1."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Names, shapes and sampled values (rounded to bfloat16) of a base's parameters.

    Attributes:
        shapes: SHA-256 over names and shapes.
        samples: values at evenly spaced places of evenly spaced tensors.
        quantization: the format that the values went through, such as `Q4_1`; None for a 16- or 32-bit source.
    """

    shapes: str
    samples: list[float]
    quantization: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Sampled(NamedTuple):
    """What a fingerprint needs of one tensor."""

    shape: tuple[int, ...]
    values: list[float]


def sampled(tensor: Tensor) -> Sampled:
    """The shape of a tensor, and values at evenly spaced places."""
    return Sampled(tuple(tensor.shape), _sample(tensor))


def fingerprint(parameters: Mapping[str, Tensor | Sampled], quantization: str | None = None) -> Fingerprint:
    """The fingerprint of a base's parameters, by name; of a tensor that is gone, what was sampled before."""
    names = sorted(parameters)
    listing = "\n".join(f"{n} {tuple(parameters[n].shape)}" for n in names)
    step = max(1, len(names) // TENSORS)
    chosen = [parameters[n] for n in names[::step][:TENSORS]]
    samples = [v for t in chosen for v in (_sample(t) if isinstance(t, Tensor) else t.values)]
    return Fingerprint(shapes=hashlib.sha256(listing.encode()).hexdigest(), samples=samples, quantization=quantization)


def _sample(tensor: Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    return [float(v) for v in flat[sampled_at(flat.numel())].to(torch.bfloat16)]


def sampled_at(count: int) -> Tensor:
    """The flat places that are sampled of a tensor of so many values."""
    return torch.linspace(0, count - 1, min(VALUES, count), dtype=torch.float64).long()


def check_same_base(recorded: Mapping[str, Any], ours: Fingerprint, adapter: str) -> str | None:
    """Compare the fingerprint in an adapter with that of the base at hand.

    Returns:
        None if they are the same, or a sentence on why they match all the same.

    Raises:
        ForeignBaseError: other shapes, or other values.
    """
    theirs = build(Fingerprint, recorded, source=f"the fingerprint in {adapter}")
    way_out = "load the base it was trained on, or pass --allow-foreign-base if you mean it"
    if theirs.shapes != ours.shapes:
        raise ForeignBaseError(f"{adapter} was trained on a base with other modules or shapes; {way_out}")
    error = _relative_error(theirs.samples, ours.samples)
    if error == 0:
        return None
    if error <= QUANTISED_ERROR and (theirs.quantization or ours.quantization):
        return f"{adapter} matches this base in another precision (sampled values differ by {error:.1%})"
    raise ForeignBaseError(f"{adapter} was trained on a base with other weights ({error:.1%} apart); {way_out}")


def _relative_error(theirs: list[float], ours: list[float]) -> float:
    """Root mean square of the relative errors tensor by tensor: norms near 1 would drown the small values of matrices."""
    if len(theirs) != len(ours):
        return float("inf")
    a, b = (_by_tensor(samples) for samples in (theirs, ours))
    size = torch.maximum(a.norm(dim=1), b.norm(dim=1)).clamp_min(torch.finfo(a.dtype).tiny)
    return float(((a - b).norm(dim=1) / size).square().mean().sqrt())


def _by_tensor(samples: list[float]) -> Tensor:
    """(tensors, VALUES): nearly all tensors give that many samples; the last row is filled with zeros."""
    return torch.tensor(samples + [0.0] * (-len(samples) % VALUES), dtype=torch.float64).view(-1, VALUES)
