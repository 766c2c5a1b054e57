"""A base with adapters on it, as every verb that uses one needs it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from twofold.adapter.attach import activate
from twofold.adapter.files import AdapterFiles, load_adapter, opened_folder
from twofold.adapter.foreign import foreign_file
from twofold.adapter.keys import PREFIX
from twofold.adapter.plain import kept_of
from twofold.adapter.updates import open_updates
from twofold.base.fingerprint import Fingerprint, check_same_base
from twofold.base.head import CLASSES, Head, TaskName
from twofold.base.load import Base, Precision, load_base, renderer_for
from twofold.base.mapped import NotMapped, map_base
from twofold.base.shapes import usual_head
from twofold.config import build
from twofold.errors import AdapterFileError, ConfigError
from twofold.events import Emit, Message, Warned, silent
from twofold.quant import Scheme

PEFT_TASKS: dict[str, TaskName] = {"SEQ_2_SEQ_LM": "seq2seq"}
"""What a file says that knows nothing of Twofold; of a classifier it does not name the classes."""


def parse_adapter(reference: str) -> tuple[Path, float]:
    """`DIR` or `DIR:scale`.

    Raises:
        ConfigError: the scale is no finite number.
    """
    folder, colon, scale = reference.rpartition(":")
    if not colon or Path(reference).is_dir():
        return Path(reference), 1.0
    try:
        found = float(scale)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"'{reference}': the part after ':' must be a finite number, as in my-adapter:0.5")
    return Path(folder), found


def open_finite(path: Path) -> AdapterFiles:
    """An adapter whose tensors are to be computed with: none holds NaN or infinity.

    Raises:
        AdapterFileError: as `open_updates`, or one does.
    """
    files = open_updates(path)
    if broken := [key.removeprefix(PREFIX) for key in files.tensors.nonfinite()]:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise AdapterFileError(f"{path}: '{broken[0]}'{more} holds NaN or infinity; train the adapter again")
    return files


def load_with_adapters(
    reference: str,
    adapters: list[str],
    dtype: Precision = "auto",
    device: str = "auto",
    emit: Emit = silent,
    *,
    quantization: Scheme | None = None,
    allow_foreign: bool = False,
) -> Base:
    """A base with the given adapters active, each at its scale, and with the chat template they were trained with.

    Raises:
        UserError: a base or an adapter that cannot be used, or adapters trained with different templates.
    """
    head = recorded_head([parse_adapter(a)[0] for a in adapters]) or usual_head(reference, emit)
    base = load_base(reference, dtype, device, emit, quantization, head)
    return with_adapters(base, adapters, emit, allow_foreign=allow_foreign)


def with_adapters(base: Base, adapters: Sequence[str], emit: Emit = silent, *, allow_foreign: bool = False) -> Base:
    """The same for a base that is loaded; its model gets the adapters."""
    weights: dict[str, float] = {}
    templates: set[str] = set()
    for i, (folder, scale) in enumerate(parse_adapter(a) for a in adapters):
        files = load_adapter(base.model, folder, name := f"adapter-{i}")
        check_base(files, base.fingerprint, emit, allow_foreign=allow_foreign)
        weights[name] = scale
        if files.provenance and files.provenance.chat_template:
            templates.add(files.provenance.chat_template)
    if len(templates) > 1:
        raise ConfigError("these adapters were trained with different chat templates and cannot answer together")
    if weights:
        activate(base.model, weights)
    for template in templates - {base.renderer.template}:
        emit(Message(text="using the chat template that the adapter was trained with"))
        base = replace(base, renderer=renderer_for(base.model, base.tokenizer, template))
    return base


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A base with adapters, as a user names them: to be loaded in the way that the work asks for.

    Attributes:
        base: whatever `load_base` takes.
        adapters: folders, each with an optional scale after a colon.
        dtype: of the base's weights.
        device: to run on.
        allow_foreign: use adapters of another base.
    """

    base: str
    adapters: tuple[str, ...]
    dtype: Precision = "auto"
    device: str = "auto"
    allow_foreign: bool = False

    def load(self, emit: Emit, quantization: Scheme | None = None) -> Base:
        """In memory, to run."""
        return load_with_adapters(
            self.base,
            list(self.adapters),
            self.dtype,
            self.device,
            emit,
            quantization=quantization,
            allow_foreign=self.allow_foreign,
        )

    def mapped(self, emit: Emit) -> Base:
        """On disk, to be merged there (`map_base`).

        Raises:
            NotMapped: the base's files do not allow it, or are of another type than is asked for.
        """
        head = recorded_head([parse_adapter(a)[0] for a in self.adapters]) or usual_head(self.base, emit)
        base = map_base(self.base, emit, head)
        stored = str(base.dtype).removeprefix("torch.")
        if self.dtype not in ("auto", stored):
            raise NotMapped(self.base, f"they hold {stored}, but {self.dtype} is asked for")
        return with_adapters(base, self.adapters, emit, allow_foreign=self.allow_foreign)


def recorded_head(folders: list[Path]) -> Head | None:
    """What adapters were trained to predict with; None if they do not say.

    Raises:
        AdapterFileError: there is none, or it cannot be read; this is told before a base is loaded.
        ConfigError: they were trained for different tasks, or classes.
    """
    found = {_head(f) for f in _folders(folders) if f.provenance or kept_of(f).task in PEFT_TASKS}
    if len(found) > 1:
        said = " and ".join(sorted(f"{h.task} {list(h.labels) or ''}".strip() for h in found))
        raise ConfigError(f"these adapters were trained for {said} and cannot go on one base; use them one at a time")
    return next(iter(found), None)


def _folders(adapters: Iterable[Path]) -> list[AdapterFiles]:
    """Those that are folders; a lone file says nothing of its training."""
    return [opened_folder(folder) for folder in adapters if not foreign_file(folder)]


def _head(files: AdapterFiles) -> Head:
    training = files.provenance.training if files.provenance else {}
    task = training.get("task", PEFT_TASKS.get(kept_of(files).task or "", "causal-lm"))
    if task not in CLASSES:
        raise AdapterFileError(f"{files.path} was trained for the task '{task}', which is none of {', '.join(CLASSES)}")
    return Head(task=task, labels=tuple(training.get("labels", ())))


def trained_over(adapters: list[str]) -> Scheme | None:
    """How the base was packed that adapters were trained on, if it was and they know.

    Raises:
        ConfigError: they were trained over differently packed bases.
    """
    found = {_recorded_scheme(files) for files in _folders(parse_adapter(a)[0] for a in adapters)}
    if len(found) > 1:
        raise ConfigError(
            f"these adapters were trained over bases packed differently ({', '.join(str(s or 'not at all') for s in found)}); say "
            "with --quantization which one to compare with"
        )
    return next(iter(found), None)


def _recorded_scheme(files: AdapterFiles) -> Scheme | None:
    training = files.provenance.training if files.provenance else None
    recorded = (training or {}).get("quantization")
    return None if recorded is None else build(Scheme, recorded, source=f"the training recorded in {files.path}")


def check_base(files: AdapterFiles, base: Fingerprint, emit: Emit, *, allow_foreign: bool) -> None:
    """Refuse an adapter of another base, unless told otherwise; say so where only shapes could be checked.

    Raises:
        ForeignBaseError: the base is not the one that the adapter was trained on.
    """
    if files.provenance is None or files.provenance.base is None:
        emit(Message(text=f"{files.path} names no base fingerprint (PEFT writes none); only its shapes were checked"))
        return
    if allow_foreign:
        return
    said = check_same_base(files.provenance.base, base, str(files.path))
    if said:
        emit(Warned(text=said))
