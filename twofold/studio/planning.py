"""What a training costs, for a page: the recipe's own plan, its terms in a row, and the GPUs that it would fit on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from twofold.config import build
from twofold.planning.memory import EXACT, UNCERTAINTY, MemoryPlan
from twofold.recipes.plan import METHODS, PlanSettings, costs, outline, plan, verdict
from twofold.recipes.preview import preview
from twofold.recipes.settings import TrainConfig
from twofold.studio.asking import THIS, body_of, of_object, parts_of
from twofold.studio.configuration import train_config
from twofold.studio.parts import Studio


class Gpu(NamedTuple):
    """A size of card, the best known of that size, and its memory in bytes, as its maker states it."""

    name: str
    cards: str
    bytes: int


GPUS = (
    Gpu("8 GB", "RTX 4060", 8 * 2**30),
    Gpu("12 GB", "RTX 3060", 12 * 2**30),
    Gpu("16 GB", "T4, RTX 4080", 16 * 2**30),
    Gpu("24 GB", "RTX 4090, L4, A10G", 24 * 2**30),
    Gpu("32 GB", "RTX 5090", 32 * 2**30),
    Gpu("48 GB", "L40S, A6000", 48 * 2**30),
    Gpu("80 GB", "A100, H100", 80 * 2**30),
    Gpu("141 GB", "H200", 141 * 10**9),
    Gpu("192 GB", "MI300X", 192 * 2**30),
)


def routes() -> list[Route]:
    """Those of this file."""
    return [
        Route("/api/plan", plan_training, methods=["POST"]),
        Route("/api/preview", preview_data, methods=["POST"]),
    ]


async def plan_training(request: Request) -> Response:
    """One plan, or with `compare` those of full fine-tuning, LoRA and QLoRA."""
    studio: Studio = parts_of(request.app)
    values = await body_of(request)
    side_by_side = values.pop("compare", False) is True
    settings = build(PlanSettings, values, source=THIS)
    reference, settings = settings.base, replace(settings, base=studio.roots.base(settings.base))
    if not side_by_side:
        return JSONResponse({**await studio.desk.do(lambda: planned(settings)), "base": reference})
    each = {m: replace(settings, method=m, quantization="none") for m in METHODS}
    found = await studio.desk.do(lambda: {m: planned(s) for m, s in each.items()})
    return JSONResponse({m: {**one, "base": reference} for m, one in found.items()})


def planned(settings: PlanSettings) -> dict[str, Any]:
    """The recipe's plan, with `terms`, `gpus` and what it takes there, and `seconds` a step."""
    found = plan(settings)
    time = found["time"]
    there = _on_gpu(settings)
    return {
        **found,
        "terms": _terms(found),
        "gpu_memory": there.as_json()["total"],
        "gpus": [{**gpu._asdict(), "fits": verdict(there, gpu.bytes)} for gpu in GPUS],
        "seconds": time and time["seconds_per_step"],
    }


def _terms(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The terms of the memory that is planned, each with its formula and bounds; the proof's comes after the steps."""
    low, high = UNCERTAINTY
    rows = []
    for name, size in found["memory"].items():
        if name == "total":
            continue
        below, above = (1.0, 1.0) if name in EXACT else (low, high)
        bounds = {"low": round(below * size), "expected": size, "high": round(above * size)}
        rows.append({"name": name, "bytes": size, "formula": found["formulas"].get(name), **bounds})
    return rows


def _on_gpu(settings: PlanSettings) -> MemoryPlan:
    """What it would take if it ran on a card."""
    there = replace(settings, device="cuda", memory=None)
    return costs(outline(there.base), there)[1]


@dataclass(frozen=True, kw_only=True)
class Previewing:
    """How many examples to show."""

    examples: int = 4


async def preview_data(request: Request) -> Response:
    """As `twofold preview --json`."""
    studio: Studio = parts_of(request.app)
    values = await body_of(request)
    config: TrainConfig = train_config(studio.roots, of_object(values, "config"))
    count = build(Previewing, {k: v for k, v in values.items() if k != "config"}, source=THIS).examples
    return JSONResponse(await studio.desk.do(lambda: preview(config, max(0, min(count, 50)))))
