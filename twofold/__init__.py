"""Twofold: plan, train, see, prove, combine, merge and serve LoRA adapters.

The front door: these names, resolved when first used. Importing the package does nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twofold.adapter.attach import activate as activate
    from twofold.adapter.attach import attach as attach
    from twofold.adapter.attach import detach as detach
    from twofold.adapter.attach import disabled as disabled
    from twofold.adapter.attach import merge as merge
    from twofold.adapter.attach import trainable_summary as trainable_summary
    from twofold.adapter.attach import unmerge as unmerge
    from twofold.adapter.config import LoraConfig as LoraConfig
    from twofold.adapter.files import load_adapter as load_adapter
    from twofold.adapter.files import save_adapter as save_adapter
    from twofold.adapter.rows import rows as rows
    from twofold.base.load import load_base as load_base
    from twofold.errors import TwofoldError as TwofoldError
    from twofold.recipes.combine import combine as combine
    from twofold.recipes.inspect import inspect_adapter as inspect_adapter
    from twofold.recipes.merge import merge_checkpoint as merge_checkpoint
    from twofold.recipes.plan import plan as plan
    from twofold.recipes.settings import TrainConfig as TrainConfig
    from twofold.recipes.train import train as train

_WHERE = {
    "LoraConfig": "adapter.config",
    "TrainConfig": "recipes.settings",
    "TwofoldError": "errors",
    "activate": "adapter.attach",
    "attach": "adapter.attach",
    "combine": "recipes.combine",
    "detach": "adapter.attach",
    "disabled": "adapter.attach",
    "inspect_adapter": "recipes.inspect",
    "load_adapter": "adapter.files",
    "load_base": "base.load",
    "merge": "adapter.attach",
    "merge_checkpoint": "recipes.merge",
    "plan": "recipes.plan",
    "rows": "adapter.rows",
    "save_adapter": "adapter.files",
    "train": "recipes.train",
    "trainable_summary": "adapter.attach",
    "unmerge": "adapter.attach",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'twofold' has no attribute '{name}'")
    return getattr(importlib.import_module(f"twofold.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
