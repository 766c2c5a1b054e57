"""`twofold merge`: a base with adapters folded in, as a standard Hugging Face folder, read back and proved."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from twofold.base.batch import Example
from twofold.base.head import head_of, task_of
from twofold.base.load import Base, Precision, load_base
from twofold.base.mapped import NotMapped
from twofold.base.shapes import usual_head
from twofold.base.stored import folder_of, left_behind, open_stored
from twofold.errors import BaseError, ConfigError, RunError
from twofold.events import Emit, Message, silent, working
from twofold.functional.widen import move_buffers
from twofold.layers.quantised import packed_as
from twofold.machine import checked_device, peak_memory_bytes
from twofold.merging.checkpoint import check_mergeable, write_merged
from twofold.merging.disk import ROUNDING, NotStreamed, differing, plan_replay, write_replay
from twofold.merging.requantised import write_requantised
from twofold.recipes.adapters import Asked, parse_adapter, recorded_head
from twofold.recipes.proof import (
    Verification,
    both_logits,
    compare,
    pad_token,
    proof_batch,
    verify_merge,
    within_memory,
)

PROMPTS = ("What is the capital of France?", "Name three fruits.", "Write one sentence about the sea.", "2 + 2 =")
"""What a merge is proved on when no data is given."""


def merge_checkpoint(
    base: Base, output: Path, examples: list[Example] | None = None, emit: Emit = silent
) -> dict[str, Any]:
    """Write the merged model, load it back from disk and compare its logits with those of the adapter kept apart.

    Raises:
        RunError: the output exists or cannot be written.
        ProofError: what was written does not say what the adapter says; the folder is kept for inspection.
    """
    _check_free(output)
    started = time.perf_counter()
    with working(f"merging into {output}", emit):
        write(base, output, emit)
    seconds = time.perf_counter() - started
    return _told(output, seconds, base.device) | _proved(
        lambda: verify_folder(base, output, examples, emit), output, emit
    )


def merge_from_disk(asked: Asked, output: Path, emit: Emit = silent, *, verify: bool = True) -> dict[str, Any]:
    """The same without loading the base to merge it; only the proof does, which can be left out.

    Raises:
        RunError: the output exists or cannot be written.
        ConfigError: no adapter counts, or the base is packed.
        ProofError: as `merge_checkpoint`.
    """
    _check_free(output)
    started = writing = time.perf_counter()
    loaded = None
    with working(f"merging into {output}", emit):
        try:
            mapped = asked.mapped(emit)
            writing = time.perf_counter()
            _stream(mapped, output, emit)
        except (NotStreamed, NotMapped) as reason:
            emit(Message(text=f"merging in memory, through transformers: {reason}"))
            loaded = asked.load(emit)
            _write_from_memory(loaded, output, emit)
    ended = time.perf_counter()
    told = _told(output, ended - started, checked_device("cpu")) | {"writing_seconds": ended - writing}
    if not verify:
        return told | {"proof_seconds": 0.0, "verification": None, "verification_skipped": "it was not asked for"}
    if loaded is not None:
        held = loaded
        return told | _proved(lambda: verify_folder(held, output, None, emit), output, emit)
    return told | _proved(lambda: _verify_apart(as_stored(asked), output, emit), output, emit)


def as_stored(asked: Asked) -> Asked:
    """In the type that the base's files have, if it runs in that."""
    if asked.dtype == "auto":
        with suppress(BaseError):
            found: Any = str(open_stored(asked.base).dtype()).removeprefix("torch.")
            return replace(asked, dtype=found) if found in get_args(Precision) else asked
    return asked


def _check_free(output: Path) -> None:
    if output.exists():
        raise RunError(f"{output} exists already; choose another output or remove it first")


def _told(output: Path, seconds: float, device: torch.device) -> dict[str, Any]:
    return {"output": str(output), "seconds": seconds, "peak_memory_bytes": peak_memory_bytes(device)}


def _proved(verify: Callable[[], Verification], output: Path, emit: Emit) -> dict[str, Any]:
    """The proof of a folder, and what it cost."""
    started = time.perf_counter()
    verification, skipped = within_memory(verify, emit)
    if verification:
        verification.require(str(output), emit)
    return {
        "proof_seconds": time.perf_counter() - started,
        "proof_peak_memory_bytes": peak_memory_bytes(checked_device("cpu")),
        "verification": verification.as_json() if verification else None,
        "verification_skipped": skipped,
    }


def write(base: Base, output: Path, emit: Emit = silent) -> None:
    """From disk to disk, where the base's files allow; else from memory, which is said.

    Raises:
        ConfigError: no adapter is active, or the base is packed.
        RunError: the output exists or cannot be written.
    """
    check_mergeable(base.model)
    try:
        _stream(base, output, emit)
    except (NotStreamed, BaseError) as reason:
        emit(Message(text=f"merging in memory, through transformers: {reason}"))
        _write_from_memory(base, output, emit)


def _stream(base: Base, output: Path, emit: Emit) -> None:
    template = base.renderer.template
    changed = template if template != base.tokenizer.chat_template else None
    stored = open_stored(base.reference)
    replay = plan_replay(base.model, stored)
    _check_outside(stored.folder, output)
    if changed is not None:
        emit(Message(text="the merged folder gets the chat template that the adapter was trained with"))
    write_replay(replay, output, chat_template=changed, emit=emit)
    _tell_left_behind(stored.folder, emit)


def _write_from_memory(base: Base, output: Path, emit: Emit) -> None:
    source = folder_of(base.reference)
    _check_outside(source, output)
    write_merged(base.model, base.tokenizer, output, chat_template=base.renderer.template, source=source)
    _tell_left_behind(source, emit)


def _check_outside(source: Path, output: Path) -> None:
    if output.resolve().is_relative_to(source.resolve()):
        raise RunError(
            f"{output} lies inside the base's own folder, all of which goes along; choose an output outside of it"
        )


def _tell_left_behind(source: Path, emit: Emit) -> None:
    if left := left_behind(source):
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        emit(Message(text=f"left behind in {source}, being other weights or links: {', '.join(left[:4])}{more}"))


def check_merged(base: Base, folder: Path, emit: Emit = silent) -> dict[str, Any]:
    """Whether a folder holds this base with the active adapters merged in, bit for bit: each tensor is formed again and compared.

    Its config must tie embedding and head as the merge does, for loading goes by that.

    Raises:
        BaseError: the folder, or the base, is no whole safetensors checkpoint.
        ConfigError: the base's files do not allow a merge from disk to disk.
    """
    if not folder.is_dir():
        raise BaseError(f"no merged checkpoint at {folder}")
    replay = plan_replay(base.model, open_stored(base.reference))
    wrong = differing(replay, open_stored(str(folder)), emit)
    config = _wrong_tie(folder, tied=_ties(base.model.config) and not replay.untied)
    rounded = set(wrong.values()) == {ROUNDING} and config is None
    return {
        "folder": str(folder),
        "holds_the_adapter": not wrong and config is None,
        "but_for_rounding": rounded,
        "differing": wrong,
        "config": config,
    }


def _wrong_tie(folder: Path, *, tied: bool) -> str | None:
    """What a folder's config says of a head that is or is not its embedding, if that is wrong."""
    from transformers import AutoConfig

    try:
        said = _ties(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise BaseError(f"cannot read the configuration of {folder}: {str(error).splitlines()[0]}") from error
    if said == tied:
        return None
    head = "its embedding" if tied else "a tensor of its own"
    return f"its config.json says tie_word_embeddings: {str(said).lower()}, though its head is {head}"


def _ties(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def said_of_check(found: Mapping[str, Any]) -> str:
    """One sentence of what `check_merged` found."""
    folder, differing, config = found["folder"], found["differing"], found["config"]
    if found["holds_the_adapter"]:
        return f"{folder} is this base with this adapter merged in, bit for bit"
    if found["but_for_rounding"]:
        return (
            f"{folder} is this base with this adapter merged in, but for values in {len(differing)} of its tensors that are "
            "rounded to a neighbour: it was merged on another machine, or by another tool"
        )
    if not differing:
        return f"{folder} has every tensor of this base with this adapter merged in, but {config}"
    listed = ", ".join(f"{key} ({what})" for key, what in list(differing.items())[:4])
    also = f"; and {config}" if config else ""
    return f"{folder} is something else: it differs in {len(differing)} of its tensors, such as {listed}{also}"


def over_packed(packed: Base, folder: Path, examples: list[Example] | None, emit: Emit = silent) -> dict[str, Any]:
    """How far a merged folder is from its adapter over the packed base that it was trained on.

    This is no proof, for the two are not the same function: packing moved the base's values, the adapter learned over the
    moved ones, and a 16-bit merge adds it to the values as they were before. It is measured and said.

    Args:
        packed: that base, with the adapters active.
    """
    with working(f"comparing with the adapter over the {packed_as(packed.model)} base", emit):
        found = verify_folder(packed, folder, examples, emit)
    return {
        "quantization": str(packed_as(packed.model)),
        "max_abs_logit_difference": found.max_abs_logit_difference,
        "top1_agreement": found.top1_agreement,
        "adapter_moves": found.control_difference,
    }


def said_of_packed(found: Mapping[str, Any]) -> str:
    """One sentence of what `over_packed` found."""
    return (
        f"the adapter was trained over the {found['quantization']} form of this base, whose values are not the merged model's: "
        f"from that pair the merged model's logits differ by at most {found['max_abs_logit_difference']:.3g} (the adapter "
        f"itself moves them by up to {found['adapter_moves']:.3g}), and {found['top1_agreement']:.1%} of its likeliest tokens are "
        "the same"
    )


def merge_requantised(base: Base, packed: Base, output: Path, emit: Emit = silent) -> dict[str, Any]:
    """Write the merged model packed again, read it back, and measure what packing took from the adapter.

    An update smaller than a step between two levels is rounded away, so a weak adapter may be lost; the difference says so.

    Args:
        base: in 16 bits, with the adapters active.
        packed: the same, packed in the way that the output is to be.

    Raises:
        ConfigError: the format cannot be written.
        RunError: the output exists or cannot be written.
    """
    scheme = packed_as(packed.model)
    if scheme is None:
        raise ConfigError(
            "nothing says how to pack the merged model: its adapter was not trained over a packed base; say it"
        )
    started = time.perf_counter()
    with working(f"merging into {output}, packed as {scheme}", emit):
        template = base.renderer.template
        write_requantised(base.model, base.tokenizer, output, packed.model, scheme, chat_template=template)
    seconds = time.perf_counter() - started
    found = over_packed(packed, output, None, emit)
    return {
        "output": str(output),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(base.device),
        "trained_over": found,
    }


def verify_folder(base: Base, folder: Path, examples: list[Example] | None, emit: Emit) -> Verification:
    """The merged folder, read back, against the adapter.

    It is loaded in the type it is stored in and on the CPU, so that its weights stay mapped from the file; each comes to the
    base's device when it is used. A second model is never held.
    """
    precision: Any = str(base.dtype).removeprefix("torch.")
    merged = load_base(str(folder), precision, "cpu", emit, head=head_of(base.model))
    move_buffers(merged.model, base.device)
    batch = proof_batch(examples or prompts(base), base.device)
    return verify_merge(base.model, batch, pad_token(base), merged.model)


def _verify_apart(asked: Asked, folder: Path, emit: Emit) -> Verification:
    """The same where nothing is loaded yet: one model after the other, so that the memory for one suffices.

    The merged folder has the tokenizer and the template that the adapter answers with, so that it gives the prompts too.
    """
    device = checked_device(asked.device)
    head = recorded_head([parse_adapter(a)[0] for a in asked.adapters]) or usual_head(str(folder))
    merged = load_base(str(folder), asked.dtype, "cpu", emit, head=head)
    move_buffers(merged.model, device)
    batch, pad_id = proof_batch(prompts(merged), device), pad_token(merged)
    found = both_logits(merged.model, batch, pad_id)
    del merged
    gc.collect()  # a model and its layers point at each other
    return compare(asked.load(emit).model, found, batch, pad_id)


def prompts(base: Base) -> list[Example]:
    """A few prompts as examples, for want of data."""
    renderer = base.renderer
    if task_of(base.model) == "seq2seq":
        return [renderer.completion(p, p) for p in PROMPTS]
    if renderer.template is None:
        return [renderer.text(p) for p in PROMPTS]
    tokens = [renderer.chat_prompt([{"role": "user", "content": p}]) for p in PROMPTS]
    return [Example(t, [False] * len(t)) for t in tokens]
