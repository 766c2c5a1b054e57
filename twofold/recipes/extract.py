"""`twofold extract`: an adapter out of a full fine-tune, both streamed from disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from twofold.adapter.config import LoraConfig, Names
from twofold.adapter.files import Provenance
from twofold.adapter.peft_config import Kept, shortest_names, task_of, with_changes
from twofold.adapter.plain import PlainAdapter, plain_config, plain_tensors, ranks_of
from twofold.adapter.shapes import module_shapes
from twofold.adapter.target import find_targets
from twofold.base.load import load_renderer, public_name
from twofold.base.streamed import StreamedBase, open_streamed
from twofold.config import check_seed
from twofold.errors import BaseError, ConfigError, RunError
from twofold.events import Emit, Warned, silent
from twofold.merging.extract import Extracted, Extraction, extracted_updates, left_out, stored_shapes
from twofold.merging.preview import share_lost


def extract(
    base: str,
    tuned: str,
    output: str | Path,
    how: Extraction,
    *,
    target_modules: Names = "all-linear",
    seed: int = 0,
    emit: Emit = silent,
) -> dict[str, Any]:
    """Write an adapter of `base` that does what `tuned` does, as far as its ranks reach.

    Args:
        base, tuned: references of the base and of its full fine-tune, stored as safetensors.
        target_modules: the modules that get updates; what changed besides is told and not carried.
        seed: of the sampled decompositions.

    Returns:
        Ranks and losses, in all and by module; what changed but is not carried, as a share of the whole change; and the names of
        what could not be compared.

    Raises:
        BaseError: one of them cannot be found, or does not lie on disk as safetensors.
        ConfigError: their shapes differ, one of them holds NaN or infinity, nothing changed, or the seed is none.
        RunError: the output exists or cannot be written.
    """
    if Path(output).exists():
        raise RunError(f"{output} exists already; choose another output or remove it first")
    check_seed(seed)
    started = time.perf_counter()
    before, after = open_streamed(base), open_streamed(tuned)
    shapes = module_shapes(before.model)
    targets = find_targets(LoraConfig(target_modules=target_modules), shapes).adapted
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = list(extracted_updates(before.read, after.read, targets, how, emit))
    if not found:
        raise ConfigError(
            f"{tuned} changes none of the modules that {base} and target_modules name: nothing to extract"
        )
    updates = {pair: update for pair, update, _ in found}
    ranks = ranks_of(updates)
    stored = {pair: stored_shapes(targets[pair.module], before.read(f"{pair.module}.weight").shape) for pair in updates}
    config = with_changes(LoraConfig(), target_modules=shortest_names(ranks, shapes))
    transposed = any(targets[m].kind == "conv1d" for m in ranks)
    adapter = PlainAdapter(
        plain_tensors(updates, ranks, stored),
        plain_config(config, ranks),
        Kept(public_name(base), task=task_of(before.model), fan_in_fan_out=transposed),
        _provenance(before, tuned, {"tuned": public_name(tuned), "seed": seed, **vars(how)}),
    )
    rest = _rest(before, after, set(ranks), emit)
    unknown = _not_compared(before, after, emit)
    adapter.write(Path(output))
    told = _told(Path(output), [one for _, _, one in found], rest, time.perf_counter() - started)
    return {**told, "not_compared": unknown}


def _provenance(base: StreamedBase, tuned: str, made: dict[str, Any]) -> Provenance:
    """The base's fingerprint, where all of its parameters lie on disk as the model has them, and how the fine-tune answers."""
    known = base.fingerprint()
    taken = known.as_json() if known else None
    try:
        renderer = load_renderer(tuned)
    except BaseError:
        return Provenance(base=taken, training={"extracted": made})
    template, ends = renderer.template, renderer.end_token_ids
    return Provenance(base=taken, chat_template=template, eos_token_ids=ends, training={"extracted": made})


def _rest(before: StreamedBase, after: StreamedBase, carried: set[str], emit: Emit) -> dict[str, float]:
    """By name, the norms of the changes that no update carries; told, since an adapter leaves them behind."""
    once: dict[
        tuple[str, str], str
    ] = {}  # weights that are tied on both sides change as one, unless one of them is carried
    for name in _names(before):
        if name in before.held & after.held and name.removesuffix(".weight") not in carried:
            once.setdefault((before.keys.get(name, name), after.keys.get(name, name)), name)
    rest = left_out(before.matrices, after.matrices, once.values())
    if rest:
        loudest = max(rest, key=rest.__getitem__)
        emit(Warned(text=f"{len(rest)} tensors changed that the adapter does not carry, most of all '{loudest}'"))
    return rest


def _not_compared(before: StreamedBase, after: StreamedBase, emit: Emit) -> list[str]:
    """The parameters that only one of the two has, or that lie there in a form that only transformers knows."""
    unknown = sorted({*_names(before), *_names(after)} - (before.held & after.held))
    if unknown:
        said = (
            f"{len(unknown)} tensors are not in both {before.reference} and {after.reference}, or in a form that is not"
        )
        emit(Warned(text=f"{said} read, so nothing tells whether they changed: {', '.join(unknown[:4])}"))
    return unknown


def _names(base: StreamedBase) -> list[str]:
    """Of all parameters, tied ones by each of their names."""
    return [name for name, _ in base.model.named_parameters(remove_duplicate=False)]


def _told(output: Path, modules: list[Extracted], rest: dict[str, float], seconds: float) -> dict[str, Any]:
    carried = sum(m.norm**2 for m in modules)
    beside = sum(norm**2 for norm in rest.values())
    return {
        "output": str(output),
        "r": max(m.r for m in modules),
        "lost": share_lost([(m.norm, m.lost) for m in modules]),
        "not_carried": {"share": beside / (carried + beside), "norms": rest},
        "modules": [m.as_json() for m in modules],
        "seconds": seconds,
    }
