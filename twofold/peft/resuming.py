"""transformers' Trainer, which goes on from its own checkpoints and ends with the best of them.

The original does both only for models wrapped by PEFT itself: it asks for their class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn

from twofold.adapter.attach import DEFAULT_NAME, attached
from twofold.adapter.files import CONFIG, open_adapter, set_tensors
from twofold.errors import RunError
from twofold.peft.model import PeftModel


class Trainer(transformers.Trainer):  # type: ignore[misc, unused-ignore]
    """As transformers' own in everything else; optimiser, schedule and random numbers are its own to restore."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        found = self.model if model is None else model
        if not isinstance(found, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        take_checkpoint(found, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if not isinstance(self.model, PeftModel):
            super()._load_best_model()
            return
        take_checkpoint(self.model, Path(str(self.state.best_model_checkpoint)))


def take_checkpoint(model: Any, folder: Path) -> None:
    """Give every attached adapter the values that a checkpoint holds of it.

    Raises:
        RunError: the checkpoint lacks one of them.
        AdapterFileError: a tensor is missing, left over or of another shape.
    """
    for name in attached(model):
        of_it = folder if name == DEFAULT_NAME else folder / name
        if not (of_it / CONFIG).is_file():
            raise RunError(f"the checkpoint {folder} holds no adapter '{name}', which the model has")
        tensors = open_adapter(of_it).tensors
        set_tensors(model, {key: tensors.read(key) for key in tensors.shapes}, name)
