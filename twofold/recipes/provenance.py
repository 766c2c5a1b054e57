"""What an adapter that was made from others knows of its base and of them: no times, no paths."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from twofold.adapter.files import TENSORS, AdapterFiles, Provenance
from twofold.adapter.peft_config import Kept
from twofold.adapter.plain import kept_of
from twofold.adapter.whole import ReadBase, check_copies, copied_modules
from twofold.base.fingerprint import Fingerprint, check_same_base
from twofold.config import build
from twofold.errors import ConfigError
from twofold.events import Emit, Warned

PASSED_ON = ("task", "labels", "quantization")
"""What a training says that goes on to be true of what is made from its adapter."""


def common_provenance(
    sources: Sequence[AdapterFiles], made: dict[str, Any], emit: Emit, *, allow_foreign: bool
) -> Provenance:
    """What all of them say of their base, and how the new one was `made`.

    Raises:
        ForeignBaseError: they were trained on different bases, and that is not allowed.
        ConfigError: they were trained with different chat templates, or to predict different things.
    """
    told = [s.provenance for s in sources if s.provenance]
    templates = {p.chat_template for p in told if p.chat_template}
    if len(templates) > 1:
        raise ConfigError("these adapters were trained with different chat templates and cannot answer together")
    return Provenance(
        base=_common_base(sources, emit, allow_foreign=allow_foreign),
        chat_template=next(iter(templates), None),
        eos_token_ids=list(dict.fromkeys(token for p in told for token in p.eos_token_ids)),
        training={**_passed_on(told), **made},
    )


def common_kept(sources: Sequence[AdapterFiles], emit: Emit) -> Kept:
    """What their configs say of the base; where they call it differently, the first one's word."""
    found = [kept_of(s) for s in sources]
    names = sorted({f"{k.base_name}@{k.revision}" if k.revision else k.base_name for k in found if k.base_name})
    if len(names) > 1:
        emit(Warned(text=f"these adapters call their base differently: {', '.join(names)}"))
    first = next((k for k in found if k.base_name), found[0])
    task = next((k.task for k in found if k.task), None)
    return replace(first, task=task, fan_in_fan_out=any(k.fan_in_fan_out for k in found))


def compare_copies(sources: Sequence[AdapterFiles], base: ReadBase | None, emit: Emit) -> None:
    """Compare what adapters hold of the base's own weights with it; without one, say that this was not done.

    Raises:
        AdapterFileError: they differ.
    """
    for source in sources:
        if base is not None:
            check_copies(source, base)
        elif copied := copied_modules(source):
            said = f"{source.path} holds a copy of the base's '{copied[0]}', which is left out and was not compared with the base"
            emit(Warned(text=said))


def digest(files: AdapterFiles) -> str:
    """SHA-256 of its tensors' file."""
    with (files.path / TENSORS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _common_base(sources: Sequence[AdapterFiles], emit: Emit, *, allow_foreign: bool) -> dict[str, Any] | None:
    known = [s for s in sources if s.provenance and s.provenance.base]
    if not known:
        return None
    recorded = known[0].provenance.base if known[0].provenance else None
    first = build(Fingerprint, recorded or {}, source=f"the fingerprint in {known[0].path}")
    for other in known[1:]:
        theirs = other.provenance.base if other.provenance else None
        if theirs != recorded and not allow_foreign:
            said = check_same_base(theirs or {}, first, str(other.path))
            if said:
                emit(Warned(text=said))
    return recorded


def _passed_on(told: Sequence[Provenance]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in PASSED_ON:
        values = [p.training[key] for p in told if p.training.get(key) is not None]
        if any(v != values[0] for v in values):
            raise ConfigError(f"these adapters differ in {key} ({', '.join(map(str, values))}) and cannot become one")
        found |= {key: values[0]} if values else {}
    return found
