"""The words and defaults that a page offers, as the code below has them: a page writes none of its own."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, get_args, get_type_hints

from twofold.base.known_shapes import KNOWN_SHAPES
from twofold.base.load import BUILT_IN, Precision
from twofold.config import as_dict
from twofold.data.examples import DataConfig
from twofold.merging.methods import METHODS, Combination
from twofold.recipes.plan import METHODS as TRAININGS
from twofold.recipes.plan import PlanSettings
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.training.optim import TrainingConfig


def defaults() -> dict[str, Any]:
    """Of a run, of a plan and of a combination."""
    whole = {f.name: f.default for f in fields(TrainConfig) if f.default is not MISSING}
    data = {f.name: f.default for f in fields(DataConfig) if f.default is not MISSING}
    run = {**whole, "data": data, "adapter": as_dict(AdapterSettings()), "training": as_dict(TrainingConfig())}
    return {"train": run, "plan": as_dict(PlanSettings()), "combine": as_dict(Combination())}


def choices() -> dict[str, list[Any]]:
    """The words that some settings may have."""
    planned, trained = get_type_hints(PlanSettings), get_type_hints(TrainingConfig)
    return {
        "combine_methods": list(METHODS),
        "methods": list(TRAININGS),
        "plan_bases": [*BUILT_IN, *KNOWN_SHAPES],
        "plan_dtypes": list(get_args(planned["dtype"])),
        "quantization": list(get_args(planned["quantization"])),
        "schedules": list(get_args(trained["schedule"])),
        "dtypes": [d for d in get_args(Precision) if d != "float16"],  # which cannot train
    }
