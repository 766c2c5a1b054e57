"""Runs side by side: which finished runs in the same folder are of the same data and base, and how they came out.

Two runs compare where the same tokens with the same masks were trained on, the same were held out, and the base holds the same
values, however it was packed. That is kept as digests in each run's report.json, from which alone the comparison is made; that of
a stream is of its first examples.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from twofold.adapter.config import LoraConfig
from twofold.config import as_dict
from twofold.recipes.charts import Json, trained
from twofold.recipes.runs import RunFolder
from twofold.recipes.settings import TrainConfig
from twofold.recipes.words import NONE, Table, dig, memory, shown

MOST = 24
"""Rows of the table, so that a folder of hundreds of runs leaves a page that can be read."""
VARIANT = ("full", "use_dora", "use_rslora", "lora_bias", "freeze_a", "init_lora_weights", "init_from")
"""Settings of an adapter that are told of each run in which they are not the default."""
DEFAULTS = {f.name: f.default for f in fields(LoraConfig)} | {"init_from": None, "full": False}


def comparable(config: TrainConfig, preflight: Json) -> dict[str, Any]:
    """What report.json keeps of a run for those that come after it: what was learned over which base, and with which settings.

    Args:
        preflight: of the run, as in preflight.json.
    """
    base = preflight["base"]
    values = hashlib.sha256(json.dumps([base["shapes"], base["samples"]]).encode()).hexdigest()
    learned: dict[str, Any] = {"task": config.task, "base": values, "streamed": config.data.streaming}
    learned |= {name: dig(preflight, name, "digest") for name in ("train", "evaluation")}
    settings = as_dict(config)
    own = {"full": True} if config.full else settings["adapter"]
    return {"identity": learned, "settings": {"adapter": own, "training": settings["training"]}}


def same_data(run: RunFolder, report: Json) -> list[dict[str, Any]]:
    """This run and the finished ones beside it on the same data and base, lowest held-out loss first.

    Args:
        report: of this run, which may not be written yet.
    """
    found = {run.path.resolve().name: report} | dict(_neighbours(run.path.resolve(), report["identity"]))
    settings = {name: _flat(one) for name, one in found.items()}
    differing = _differing(list(settings.values()))
    rows = [
        {
            "run": name,
            "this": one is report,
            "quantization": one.get("quantization"),
            "dtype": one.get("dtype"),
            "r": settings[name].get("adapter.r"),
            "settings": {k: v for k, v in settings[name].items() if k in differing or _is_variant(k, v)},
            "base_loss": _number(dig(one, "evaluation", "base", "loss")),
            "adapter_loss": _number(dig(trained(one), "loss")),
            "peak_memory_bytes": _number(one.get("peak_memory_bytes")),
            "examples_per_second": _number(one.get("examples_per_second")),
        }
        for name, one in found.items()
    ]
    return sorted(rows, key=lambda row: (math.inf if row["adapter_loss"] is None else row["adapter_loss"], row["run"]))


def _neighbours(own: Path, identity: Json) -> Iterator[tuple[str, Json]]:
    """Reports of other finished runs that are of this; a folder that cannot be read holds none."""
    for folder in sorted(own.parent.iterdir()):
        try:
            found = json.loads(RunFolder(folder).report.read_text(encoding="utf-8")) if folder != own else None
        except (OSError, ValueError):
            continue
        if isinstance(found, Mapping) and found.get("identity") == identity:
            yield folder.name, found


def _flat(report: Json) -> dict[str, Any]:
    """The settings by their names as flags, such as `adapter.r`."""
    parts = {part: dig(report, "settings", part) for part in ("adapter", "training")}
    return {f"{part}.{k}": v for part, found in parts.items() if isinstance(found, Mapping) for k, v in found.items()}


def _differing(settings: Sequence[Json]) -> set[str]:
    names = {name for one in settings for name in one} - {"adapter.r"}
    return {n for n in names if any(one.get(n) != settings[0].get(n) for one in settings)}


def _is_variant(name: str, value: Any) -> bool:
    part, _, setting = name.partition(".")
    return part == "adapter" and setting in VARIANT and value != DEFAULTS[setting]


def _number(value: Any) -> int | float | None:
    """A figure of a file that anybody may have written."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


def others_table(report: Json) -> Table | None:
    """The runs side by side for the page; None where there is no other one."""
    rows: Sequence[Json] = report.get("same_data") or []
    if len(rows) < 2:
        return None
    kept = [row for i, row in enumerate(rows) if i < MOST or row.get("this")]
    left_out = f"; {len(rows) - len(kept)} more are in report.json" if len(rows) > len(kept) else ""
    return Table(
        f"As they stood when this run ended, lowest held-out loss first{left_out}",
        ["Run", "Base in", "r", "Settings", "Base's loss", "Adapter's loss", "Peak memory", "Examples/s"],
        [_cells(row) for row in kept],
    )


def _cells(row: Json) -> list[str]:
    return [
        f"{row['run']} (this run)" if row.get("this") else str(row["run"]),
        str(row.get("quantization") or row.get("dtype")),
        NONE if row.get("r") is None else str(row["r"]),
        ", ".join(_setting(k, v) for k, v in row["settings"].items()) or "plain LoRA",
        shown(row.get("base_loss"), ".4f"),
        shown(row.get("adapter_loss"), ".4f"),
        shown(row.get("peak_memory_bytes"), memory),
        shown(row.get("examples_per_second"), ".2f"),
    ]


def _setting(name: str, value: Any) -> str:
    own = name.partition(".")[2]
    if isinstance(value, bool):
        return own if value else f"no {own}"
    return f"{own} {value:g}" if isinstance(value, float) else f"{own} {value}"
