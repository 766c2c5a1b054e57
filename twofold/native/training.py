"""The compiled kernels of a training step, in place of PyTorch's operations: within `native_kernels`, on CPUs that can.

Each function here computes what its original does, for tensors on the CPU in float32 or bfloat16; anything else goes to the
original. Sums are in float32 and rounded once, so in bfloat16 results are a little nearer the truth than the original's.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from twofold.functional import attention, gated, loss, norm, rope
from twofold.functional.attention import KEEP_UP_TO, Scoring
from twofold.functional.gated import ACTIVATIONS, Activation
from twofold.functional.loss import HeadLoss
from twofold.functional.norm import Norm
from twofold.functional.rope import Angles
from twofold.functional.segments import AttentionPlan, rounded_up
from twofold.lowrank.products import Term, crossed, sum_of_products
from twofold.native.build import NotBuilt, library
from twofold.native.packed import DTYPES, WIDTH
from twofold.replaceable import original, replaced

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_DOORS: dict[str, list[Any]] = {
    "product": [ctypes.c_char_p, _I, _P, _P, _I, _P, _I, _I, _I],
    "crossed": [_P, _I, _P, _I, _I, _I, _I, _I, _F, _P],
    "reciprocal_rms": [_P, _F, _I, _I, _P],
    "norm": [_P, _P, _P, _I, _I, _I, _P],
    "norm_backward": [_P, _P, _P, _P, _I, _P, _I, _I, _P],
    "gated": [_P, _I, _P, _I, _I, _I, _I, _P],
    "gated_backward": [_P, _P, _I, _P, _I, _I, _I, _I, _P, _P],
    "rotate": [_P, _I, _P, _P, _I, _I, _I, _I, _P],
    "loss": [_P, _P, _I, _I, _I, _P, _P],
    "attention": [ctypes.c_char_p, _P],
    "attention_backward": [ctypes.c_char_p, _P, _P, _P, _P],
}

PLACES = 384
"""Rows of a floor's products of attention, so that what they give stays in the caches, as a kernel's does."""
_TERM = struct.Struct("=QqQqqqd")
_ATTENTION = struct.Struct("=QQQqqqQqQqqqqqqqddQ")


def _typed(dtype: torch.dtype) -> SimpleNamespace:
    """The kernels of one type, by name.

    Raises:
        NotBuilt: why there are none.
    """
    if dtype not in DTYPES:
        raise NotBuilt(f"there are none for {dtype}")
    found, doors = library("training"), SimpleNamespace()
    for name, arguments in _DOORS.items():
        try:
            door = getattr(found, f"{name}_{DTYPES[dtype]}")
        except AttributeError:
            raise NotBuilt(f"PyTorch's are the better ones for {dtype} on this processor") from None
        door.argtypes, door.restype = arguments, None
        setattr(doors, name, door)
    return doors


@lru_cache
def _kernels(dtype: torch.dtype) -> SimpleNamespace | None:
    try:
        return _typed(dtype)
    except NotBuilt:
        return None


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why training over weights of this type on this device does not run on these kernels; None where it does."""
    if device.type != "cpu":
        return f"they are for CPUs, not for {device.type}"
    try:
        _typed(dtype)
    except NotBuilt as error:
        return str(error)
    return None


def _of(*tensors: Tensor) -> SimpleNamespace | None:
    """The kernels for tensors that they can read: of one type, on the CPU, with rows that have no gaps."""
    dtype = tensors[0].dtype
    for t in tensors:  # some thousand times a step: a generator here takes half a per cent of it
        if t.dtype != dtype or not t.is_cpu or type(t) not in (Tensor, Parameter) or t.stride(-1) != 1:
            return None
    return _kernels(dtype)


def _sum_of_products(terms: Sequence[Term], bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    x, weight, as_read, _ = terms[0]
    matrices = [t.weight for t in terms if isinstance(t.weight, Tensor)]
    even = len(matrices) == len(terms) and all(t.x.shape[1] % 2 == 0 for t in terms)
    k = _of(*(t.x for t in terms), *matrices, *(t for t in (bias, onto) if t is not None)) if even else None
    shape = len(x), weight.shape[1 if as_read else 0]
    if k is None or 0 in shape:
        return original(sum_of_products)(terms, bias, onto)
    y = x.new_empty(shape)
    added = (_address(bias), _address(onto), 0 if onto is None else onto.stride(0))
    k.product(_packed(terms), len(terms), *added, y.data_ptr(), *y.shape, y.stride(0))
    return y


def _crossed(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    k = _of(left, right)
    shape = left.shape[1], right.shape[1]
    if k is None or 0 in shape:
        return original(crossed)(left, right, scale)
    y = left.new_empty(shape, dtype=torch.float32)
    turned = left.shape[1] > right.shape[1]
    narrow, wide = (right, left) if turned else (left, right)
    read = (narrow.data_ptr(), narrow.stride(0), wide.data_ptr(), wide.stride(0))
    k.crossed(*read, len(narrow), narrow.shape[1], wide.shape[1], turned, scale, y.data_ptr())
    return y


def _packed(terms: Sequence[Term]) -> bytes:
    """As the kernels read terms."""
    return b"".join(
        _TERM.pack(x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0), x.shape[1], as_read, scale)
        for x, w, as_read, scale in terms
        if isinstance(w, Tensor)
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _reciprocal_rms(x: Tensor, of: Norm) -> Tensor:
    k = _of(x) if x.is_contiguous() else None
    if k is None:
        return original(norm.reciprocal_rms)(x, of)
    rho = x.new_empty(len(x), 1, dtype=torch.float32)
    k.reciprocal_rms(x.data_ptr(), of.eps, *x.shape, rho.data_ptr())
    return rho


def _norm_kernels(of: Norm, *tensors: Tensor) -> SimpleNamespace | None:
    known = of.weight.dtype in (torch.float32, tensors[0].dtype) and of.weight.device.type == "cpu"
    return _of(*tensors) if known and all(t.is_contiguous() for t in tensors) else None


def _normed(x: Tensor, rho: Tensor, of: Norm) -> Tensor:
    k = _norm_kernels(of, x)
    if k is None:
        return original(norm.normed)(x, rho, of)
    y = torch.empty_like(x)
    k.norm(x.data_ptr(), rho.data_ptr(), of.weight.data_ptr(), of.weight.dtype != x.dtype, *x.shape, y.data_ptr())
    return y


def _norm_backward(dy: Tensor, x: Tensor, rho: Tensor, of: Norm, onto: Tensor | None = None) -> Tensor:
    k = _norm_kernels(of, x, dy, *(() if onto is None else (onto,)))
    if k is None:
        return original(norm.rms_norm_backward)(dy, x, rho, of, onto)
    dx, wide = torch.empty_like(x), of.weight.dtype != x.dtype
    read = (dy.data_ptr(), x.data_ptr(), rho.data_ptr(), of.weight.data_ptr())
    k.norm_backward(*read, wide, _address(onto), *x.shape, dx.data_ptr())
    return dx


def _is_gelu(f: Activation) -> bool:
    return f is ACTIVATIONS["gelu_pytorch_tanh"]


def _gated(gate: Tensor, up: Tensor, f: Activation) -> Tensor:
    k = _of(gate, up)
    if k is None:
        return original(gated.gated)(gate, up, f)
    y = gate.new_empty(gate.shape)
    read = (gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0))
    k.gated(*read, _is_gelu(f), *y.shape, y.data_ptr())
    return y


def _gated_backward(dy: Tensor, gate: Tensor, up: Tensor, f: Activation) -> tuple[Tensor, Tensor]:
    k = _of(dy, gate, up) if dy.is_contiguous() else None
    if k is None:
        return original(gated.gated_backward)(dy, gate, up, f)
    dgate, dup = torch.empty_like(dy), torch.empty_like(dy)
    read = (dy.data_ptr(), gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0))
    k.gated_backward(*read, _is_gelu(f), *dy.shape, dgate.data_ptr(), dup.data_ptr())
    return dgate, dup


def _rotate(x: Tensor, angles: Angles) -> Tensor:
    turned = angles.cos.shape[-1]
    whole = turned % (2 * WIDTH) == 0 and x.stride(1) == x.shape[2]
    k = _of(x, angles.cos, angles.sin) if whole and angles.cos.is_contiguous() and angles.sin.is_contiguous() else None
    if k is None:
        return original(rope.rotate)(x, angles)
    y = x.new_empty(x.shape)
    turn = (angles.cos.data_ptr(), angles.sin.data_ptr())
    k.rotate(x.data_ptr(), x.stride(0), *turn, *x.shape, turned, y.data_ptr())
    return y


def _chunk_loss(logits: Tensor, labels: Tensor, softcap: float | None, *, gradient: bool) -> HeadLoss:
    k = _of(logits) if softcap is None and logits.is_contiguous() and labels.is_contiguous() else None
    if k is None:
        return original(loss.chunk_loss)(logits, labels, softcap, gradient=gradient)
    losses, right = logits.new_empty(len(labels), dtype=torch.float32), torch.empty_like(labels)
    written = (losses.data_ptr(), right.data_ptr())
    k.loss(logits.data_ptr(), labels.data_ptr(), gradient, *logits.shape, *written)
    return HeadLoss(losses.sum(), right.sum())


def _logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    term = Term(hidden, head)
    return _sum_of_products([term]) if _widened(head) else original(loss.logits_of)(hidden, head)


def _hidden_gradient(dlogits: Tensor, head: Tensor) -> Tensor:
    term = Term(dlogits, head, as_read=True)
    return _sum_of_products([term]) if _widened(head) else original(loss.hidden_gradient)(dlogits, head)


def _widened(weight: Tensor) -> bool:
    """Whether this processor has no products of the type: PyTorch's, elsewhere faster for a head, take many times as long."""
    known = weight.dtype == torch.bfloat16 and weight.is_cpu and _kernels(weight.dtype) is not None
    return known and bool(library("training").widens_bfloat16())


def _attention_kernels(*tensors: Tensor) -> SimpleNamespace | None:
    heads_side_by_side = all(t.stride(1) == t.shape[2] and t.shape[2] % 2 == 0 for t in tensors)
    return _of(*tensors) if heads_side_by_side else None


def _attention_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scoring: Scoring
) -> tuple[Tensor, list[Tensor | None]]:
    """Instead of probabilities, the logarithm of each row's sum is kept, behind the None of each chunk that are not."""
    kernels = _attention_kernels(q, k, v)
    if kernels is None:
        return original(attention.attention_forward)(q, k, v, plan, scoring)
    out, sums = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    kernels.attention(_attention(q, k, v, plan, scoring, sums), out.data_ptr())
    return out, [*(None for bucket in plan.buckets for _ in bucket.chunks), sums]


def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor | None], plan: AttentionPlan, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    sums = kept[-1] if len(kept) > sum(len(bucket.chunks) for bucket in plan.buckets) else None
    kernels = _attention_kernels(q, k, v, do)
    if sums is None or kernels is None or not do.is_contiguous():
        return original(attention.attention_backward)(do, q, k, v, kept, plan, scoring)
    found = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    kernels.attention_backward(
        _attention(q, k, v, plan, scoring, sums), do.data_ptr(), *(gradient.data_ptr() for gradient in found)
    )
    return found


def _attention_products(
    plan: AttentionPlan, d: int, scoring: Scoring, operand: Callable[..., Tensor], *, backward: bool
) -> None:
    """Over as many keys as a query sees on average: nothing is padded, and nothing that is masked is computed."""
    queries = int(plan.spans.table[:, 5].sum())
    keys = rounded_up(-(-plan.spans.keys_seen // max(1, queries)), 2)
    blocks = -(-queries * plan.heads.queries // PLACES)
    places = rounded_up(-(-queries * plan.heads.queries // max(1, blocks)), 2)
    q, k, p = (operand(*shape) for shape in ((places, d), (keys, d), (places, keys)))
    if _attention_kernels(q[None], k[None]) is None:
        return original(attention.attention_products)(plan, d, scoring, operand, backward=backward)
    scores, mixed, turned = [Term(q, k)], [Term(p, k, as_read=True)], [Term(operand(keys, places), q, as_read=True)]
    again = [scores] if keys > KEEP_UP_TO else []
    for _ in range(blocks):
        for terms in (scores, mixed, *((scores, *again, mixed, turned, turned) if backward else ())):
            sum_of_products(terms)
    return None


def _attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scoring: Scoring, sums: Tensor) -> bytes:
    """As the kernels read it."""
    table, asking, window = plan.spans
    (queries, heads, d), (rows, key_heads, _) = q.shape, k.shape
    return _ATTENTION.pack(
        *(t.data_ptr() for t in (q, k, v)),
        *(t.stride(0) for t in (q, k, v)),
        *(table.data_ptr(), len(table), asking.data_ptr()),
        *(queries, rows, window or 0, heads, key_heads, d, d),
        *(scoring.scale, scoring.softcap or 0.0, sums.data_ptr()),
    )


KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {
    sum_of_products: _sum_of_products,
    crossed: _crossed,
    norm.reciprocal_rms: _reciprocal_rms,
    norm.normed: _normed,
    norm.rms_norm_backward: _norm_backward,
    gated.gated: _gated,
    gated.gated_backward: _gated_backward,
    rope.rotate: _rotate,
    attention.attention_forward: _attention_forward,
    attention.attention_backward: _attention_backward,
    attention.attention_products: _attention_products,
    loss.chunk_loss: _chunk_loss,
    loss.logits_of: _logits_of,
    loss.hidden_gradient: _hidden_gradient,
}
"""What takes the place of which function."""


@contextmanager
def native_kernels() -> Iterator[None]:
    """Run them in place of what they stand for, for the length of a `with` block."""
    with replaced(KERNELS):
        yield
