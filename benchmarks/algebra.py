"""Combining, extracting and inspecting adapters, beside PEFT and dense decompositions, on modules of a 7B model's size.

    python benchmarks/algebra.py                 the table of docs/combining.md
    python benchmarks/algebra.py --width 512     small, to see that it runs
    python benchmarks/algebra.py --only beside_base

Each row does one thing in two ways, on the same random factors or weights: seconds of each, their ratio, and how far the error of
ours is above the peer's. What is slow is timed on one module, so that the whole stays under five minutes; the last rows are
`twofold inspect` of a whole adapter file, 224 modules of r = 64, against the dense decomposition of one of its square modules,
times 224, and `twofold compare` of two such files, against twice that.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from twofold.adapter.config import LoraConfig
from twofold.adapter.files import PREFIX, open_adapter
from twofold.adapter.plain import Kept, PlainAdapter
from twofold.adapter.shapes import module_shapes
from twofold.base.streamed import open_streamed
from twofold.events import silent
from twofold.inspection.against_base import beside_base as measured_beside
from twofold.inspection.compare import compare_adapters
from twofold.inspection.report import report_adapter
from twofold.lowrank.algebra import concatenated, factored, truncated
from twofold.lowrank.factors import LowRank
from twofold.lowrank.intruders import intruders

T = TypeVar("T")
RANK = 16
DETAIL = 64
"""The rank of the adapter that is inspected."""
LAYERS = 32
SHAPES = {
    "self_attn.q_proj": (1, 1),
    "self_attn.k_proj": (1, 1),
    "self_attn.v_proj": (1, 1),
    "self_attn.o_proj": (1, 1),
    "mlp.gate_proj": (2.6875, 1),
    "mlp.up_proj": (2.6875, 1),
    "mlp.down_proj": (1, 2.6875),
}
"""Outputs and inputs of Llama-2-7B's modules, in hidden widths."""


def timed(work: Callable[[], T], times: int = 1) -> tuple[float, T]:
    """The shortest of so many runs."""
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - started)
    return best, found


def random_update(width: int, r: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, width, generator=generator) / width**0.5
    return LowRank(A, torch.randn(width, r, generator=generator) * 0.01, 2.0)


def combining(width: int) -> str:
    """Two adapters of r = 16 into one, by PEFT's add_weighted_adapter(svd) and from the factors."""
    updates = [random_update(width, RANK, seed) for seed in (1, 2)]
    total = 0.7 * updates[0].delta() + 0.3 * updates[1].delta()
    ours, reduced = timed(lambda: truncated(concatenated(updates, [0.7, 0.3]), RANK), times=5)
    model = peft_model(width, updates)
    call: dict[str, Any] = {"combination_type": "svd", "svd_rank": RANK}
    theirs, _ = timed(lambda: model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", **call))
    layer = model.base_model.model.linear
    found = layer.get_delta_weight("both")
    errors = [float((d - total).norm() / total.norm()) for d in (reduced.update.delta(), found)]
    return row("combine two adapters, svd", "PEFT add_weighted_adapter", ours, theirs, errors[0] / errors[1] - 1)


def peft_model(width: int, updates: list[LowRank]) -> Any:
    """One linear layer with these adapters."""
    import peft

    base = nn.Sequential()
    base.add_module("linear", nn.Linear(width, width, bias=False))
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["linear"])
    model = peft.get_peft_model(base, config, "a")
    model.add_adapter("b", config)
    for name, update in zip("ab", updates, strict=True):
        model.base_model.model.linear.lora_A[name].weight.data = update.A.clone()
        model.base_model.model.linear.lora_B[name].weight.data = update.B.clone()
    return model


def change(width: int) -> Tensor:
    """What a full fine-tune may change: directions that fall off, in noise of full rank."""
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.randn(width, 128, generator=generator) for _ in range(2))
    return (u * torch.arange(1, 129.0).pow(-0.7)) @ v.T / width + 0.002 * torch.randn(width, width, generator=generator)


def extracting(width: int) -> str:
    """One module at r = 32, sampled, and by a dense decomposition in float32 as others do it."""
    delta = change(width)
    ours, reduced = timed(lambda: factored(delta, 32), times=3)
    theirs, dense = timed(lambda: torch.linalg.svd(delta, full_matrices=False))
    best = float(dense.S[32:].square().sum()) ** 0.5
    error = float((reduced.update.delta() - delta).norm())
    return row("extract r = 32 of one module", "torch.linalg.svd", ours, theirs, error / best - 1)


def inspecting(width: int) -> str:
    """A whole adapter file, against dense singular values of B·A."""
    with tempfile.TemporaryDirectory() as folder:
        path = written(width, Path(folder) / "adapter")
        ours, report = timed(lambda: report_adapter(open_adapter(path)))
    theirs, largest = dense(width)
    square = next(m for m in report.modules if m.name.endswith("q_proj"))
    if abs(square.spectral_norm / largest - 1) > 1e-4:
        raise SystemExit("the two decompositions differ")
    what = f"inspect {len(report.modules)} modules, r = {DETAIL}"
    return row(what, "dense svdvals, one module, times 224", ours, theirs * 224, None)


@cache
def dense(width: int) -> tuple[float, float]:
    """Seconds of a dense decomposition of one square module's B·A, and its largest singular value."""
    update = random_update(width, DETAIL, 0)
    seconds, values = timed(lambda: torch.linalg.svdvals(update.delta()))
    return seconds, float(values[0])


def comparing(width: int) -> str:
    """Two whole adapter files, against dense singular values of B·A of both."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [written(width, Path(folder) / f"adapter-{seed}", seed=seed) for seed in (0, 1)]
        ours, found = timed(lambda: compare_adapters(*(open_adapter(path) for path in paths)))
    deltas = [random_update(width, DETAIL, seed).delta() for seed in (0, 1)]
    cosine = float((deltas[0] * deltas[1]).sum() / deltas[0].norm() / deltas[1].norm())
    square = next(m for m in found.modules if m.name.endswith("q_proj"))
    if abs(square.cosine - cosine) > 1e-4:
        raise SystemExit("the two cosines differ")
    what = f"compare two adapters, {len(found.modules)} modules, r = {DETAIL}"
    return row(what, "dense svdvals, one module of each, times 224", ours, 2 * dense(width)[0] * 224, None)


def beside_base(width: int) -> str:
    """One layer of a base on disk: reading its file, and inspecting an adapter beside it, both with nothing in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        base = stored_base(width, Path(folder))
        streamed = open_streamed(str(base))
        files, loud = (
            open_adapter(written(width, Path(folder) / name, 1, size))
            for name, size in (("usual", 0.0005), ("loud", 0.01))
        )
        shapes = module_shapes(streamed.model)
        weights = base / "model.safetensors"
        forget(weights)
        read, _ = timed(lambda: len(weights.read_bytes()))
        forget(weights)
        ours, _ = timed(lambda: measured_beside(files, shapes, streamed, None, silent))
        forget(weights)
        look = partial(intruders, k=10)
        more, _ = timed(lambda: measured_beside(files, shapes, streamed, look, silent))
        forget(weights)
        most, _ = timed(lambda: measured_beside(loud, shapes, streamed, look, silent))
        size = weights.stat().st_size
    return (
        f"\nBeside a base, one layer of {size / 1e6:,.0f} MB in bf16, r = {DETAIL}: reading the file {read:.2f} s, inspecting "
        f"{ours:.2f} s ({ours / read:.1f} times), with intruders {more:.2f} s ({more / read:.1f} times), where there are some "
        f"{most:.2f} s ({most / read:.1f} times)."
    )


def stored_base(width: int, folder: Path) -> Path:
    """A Llama of one layer and a small vocabulary, random with falling singular values, in bfloat16."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=int(2.6875 * width),
        num_hidden_layers=1,
        num_attention_heads=32,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for weight in (
        p for p in model.parameters() if p.dim() == 2
    ):  # singular values that fall off, as those of trained weights do
        weight.data *= torch.arange(1, weight.shape[1] + 1.0).pow(-0.5).bfloat16() * weight.shape[1] ** 0.25
    model.save_pretrained(folder / "base")
    return folder / "base"


def forget(path: Path) -> None:
    """Let the kernel drop what it remembers of a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def written(width: int, path: Path, layers: int = LAYERS, size: float = 0.01, seed: int = 0) -> Path:
    """An adapter of every linear module of a model with this width; `size` is that of B's values."""
    tensors = {}
    for layer in range(layers):
        for name, (out, in_) in SHAPES.items():
            key = f"{PREFIX}model.layers.{layer}.{name}"
            generator = torch.Generator().manual_seed(seed)
            A = torch.randn(DETAIL, int(in_ * width), generator=generator) / (in_ * width) ** 0.5
            tensors[f"{key}.lora_A.weight"] = A
            tensors[f"{key}.lora_B.weight"] = torch.randn(int(out * width), DETAIL, generator=generator) * size
    config = LoraConfig(r=DETAIL, lora_alpha=2 * DETAIL, target_modules=[n.split(".")[1] for n in SHAPES])
    return PlainAdapter(tensors, config, Kept()).write(path)


def row(what: str, peer: str, ours: float, theirs: float, above: float | None) -> str:
    error = "" if above is None else f"{above:+.3%}"
    return f"| {what} | {ours:.3f} | {peer} | {theirs:.2f} | {theirs / ours:.0f} | {error} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = {measure.__name__: measure for measure in (combining, extracting, inspecting, comparing, beside_base)}
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--only", choices=rows, help="one row")
    given = parser.parse_args()
    torch.manual_seed(0)
    print("| what | ours, s | peer | peer, s | times faster | error above the peer's |\n|---|---|---|---|---|---|")
    for name, measure in rows.items():
        if given.only in (None, name):
            print(measure(given.width), flush=True)


if __name__ == "__main__":
    main()
