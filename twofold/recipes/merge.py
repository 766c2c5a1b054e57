"""`twofold merge`: a base with adapters folded in, as a standard Hugging Face folder, read back and proved."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from twofold.base.batch import Example
from twofold.base.load import Base, load_base
from twofold.errors import RunError
from twofold.events import Emit, silent, working
from twofold.functional.widen import move_buffers
from twofold.machine import peak_memory_bytes
from twofold.merging.checkpoint import write_merged
from twofold.recipes.proof import Verification, pad_token, proof_batch, verify_merge, within_memory

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
    if output.exists():
        raise RunError(f"{output} exists already; choose another output or remove it first")
    started = time.perf_counter()
    with working(f"merging into {output}", emit):
        write_merged(base.model, base.tokenizer, output, chat_template=base.renderer.template)
    seconds = time.perf_counter() - started
    verification, skipped = within_memory(lambda: verify_folder(base, output, examples, emit), emit)
    if verification:
        verification.require(str(output), emit)
    return {
        "output": str(output),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(base.device),
        "verification": verification.as_json() if verification else None,
        "verification_skipped": skipped,
    }


def verify_folder(base: Base, folder: Path, examples: list[Example] | None, emit: Emit) -> Verification:
    """The merged folder, read back, against the adapter.

    It is loaded in the type it is stored in and on the CPU, so that its weights stay mapped from the file; each comes to the
    base's device when it is used. A second model is never held.
    """
    precision: Any = str(base.dtype).removeprefix("torch.")
    merged = load_base(str(folder), precision, "cpu", emit)
    move_buffers(merged.model, base.device)
    batch = proof_batch(examples or prompts(base), base.device)
    return verify_merge(base.model, batch, pad_token(base), merged.model)


def prompts(base: Base) -> list[Example]:
    """A few prompts as examples, for want of data."""
    renderer = base.renderer
    if renderer.template is None:
        return [renderer.text(p) for p in PROMPTS]
    tokens = [renderer.chat_prompt([{"role": "user", "content": p}]) for p in PROMPTS]
    return [Example(t, [False] * len(t)) for t in tokens]
