"""Variants of LoRA on the same data with the same seed and budget, one setting each: held-out loss against steps.

    python benchmarks/variants.py                                    512 examples each
    python benchmarks/variants.py --quick                            32 examples, to see that it runs
    python benchmarks/variants.py --examples 128 --held-out 48 --picture docs/variants.svg

Home intents over the built-in base, rank 16 on all linear layers. Prints a table in Markdown and draws a picture. One
setting and one seed say which variant runs and roughly how it learns, not which is best: arXiv 2602.04998 finds ten
variants within 1-2 % of each other once each has its own learning rate.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from twofold.data import home_intents
from twofold.data.examples import DataConfig
from twofold.events import Evaluated, Event
from twofold.recipes.charts import Chart, Line, Marker, draw
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.recipes.train import train
from twofold.training.optim import TrainingConfig

RATE, GENTLE = 1e-3, 2e-4
"""The learning rate of factors that start from zero, and of those that start from the weights or their gradient."""
COLOURS = (
    *("#1b1b1b", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e"),
    *("#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"),
)

STYLE = (
    "path{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}.grid{stroke:#ddd}.tip *{opacity:0}.mark{fill:#555}"
    ".tick{fill:#555;font-size:12px}.tick.y{text-anchor:end}.tick.x{text-anchor:middle}.plot{overflow:visible}"
)
PAGE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 440" font-family="sans-serif" font-size="14"><style>{}</style>'
    '<rect width="860" height="440" fill="#fff"/><svg x="60" y="20" width="640" height="370" overflow="visible">{}</svg>'
    '<text x="380" y="432" text-anchor="middle" fill="#555">optimiser steps</text>{}</svg>\n'
)


@dataclass(frozen=True)
class Variant:
    """One setting of one variant, over the common ones."""

    name: str
    adapter: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def said(self) -> str:
        """The settings that are its own."""
        return ", ".join(f"{k} {v}" for k, v in {**self.adapter, **self.training}.items()) or "the common ones"


def _from(start: str) -> Variant:
    return Variant(start, {"init_lora_weights": start, "lora_alpha": 16}, {"learning_rate": GENTLE})


VARIANTS = (
    Variant("LoRA"),
    Variant("rsLoRA", {"use_rslora": True, "lora_alpha": 8}),
    Variant("DoRA", {"use_dora": True}),
    Variant("LoRA+", training={"learning_rate": RATE / 4, "loraplus_lr_ratio": 16.0}),
    Variant("LoRA-FA", {"freeze_a": True}),
    Variant("lora_bias", {"lora_bias": True}),
    Variant("orthogonal", {"init_lora_weights": "orthogonal"}),
    Variant("eva", {"init_lora_weights": "eva"}),
    *map(_from, ("pissa_niter_4", "olora", "lora_ga")),
)


@dataclass
class Curve:
    """What a training said: held-out losses by step, and its report."""

    variant: Variant
    points: list[tuple[int, float]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def hear(self, event: Event) -> None:
        if isinstance(event, Evaluated):
            self.points.append((event.step, event.loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--evaluate-every", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="32 examples, 16 held out, the first three variants")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    examples, held_out = (32, 16) if given.quick else (given.examples, given.held_out)
    curves = []
    with tempfile.TemporaryDirectory() as folder:
        home_intents.write(Path(folder), examples, held_out)
        for variant in VARIANTS[:3] if given.quick else VARIANTS:
            curves.append(trained(variant, Path(folder), given.evaluate_every))
            print(row(curves[-1]) if len(curves) > 1 else f"{heading()}\n{row(curves[-1])}", flush=True)
    if given.picture:
        given.picture.write_text(picture(curves), encoding="utf-8")


def trained(variant: Variant, folder: Path, evaluate_every: int) -> Curve:
    """Train one variant; nothing else differs."""
    curve = Curve(variant)
    training = {"batch_size": 16, "learning_rate": RATE, "evaluate_every": evaluate_every, "checkpoint_every": None}
    data = DataConfig(train=str(folder / "train.jsonl"), evaluation=str(folder / "evaluation.jsonl"))
    config = TrainConfig(
        data=data,
        adapter=AdapterSettings(**{"r": 16, "lora_alpha": 32, **variant.adapter}),
        training=TrainingConfig(**{**training, **variant.training}),
        output=str(folder / f"run-{variant.name}"),
        verify=False,
    )
    curve.report = train(config, curve.hear)
    curve.points.insert(0, (0, curve.report["evaluation"]["base"]["loss"]))
    return curve


def heading() -> str:
    """The head of the table."""
    return "| variant | its own settings | trains | held-out loss | token accuracy | seconds a step |\n|---|---|---|---|---|---|"


def row(curve: Curve) -> str:
    """One line of the table."""
    found = curve.report
    last = found["evaluation"]["adapter"]
    per_step = found["seconds"] / found["steps"]
    trains = found["parameters"]["trainable"]
    figures = f"{trains:,} | {last['loss']:.4f} | {last['token_accuracy']:.3f} | {per_step:.1f}"
    return f"| {curve.variant.name} | {curve.variant.said()} | {figures} |"


def picture(curves: Sequence[Curve]) -> str:
    """The curves as one SVG that needs no page around it. All begin at the base's loss, which is left out for scale."""
    lines = [Line(c.points[1:], f"v{i}") for i, c in enumerate(curves)]
    ends = [Marker(c.points[-1], f"{c.variant.name}: {c.points[-1][1]:.4f}") for c in curves]
    plot = draw(Chart("Held-out loss against steps", lines, lambda p: f"step {p[0]}: {p[1]:.4f}", ends))
    style = "".join(f".v{i}{{stroke:{colour}}}" for i, colour in enumerate(COLOURS))
    legend = Markup("").join(
        Markup('<text x="720" y="{}" fill="{}">{}</text>').format(40 + 24 * i, COLOURS[i], c.variant.name)
        for i, c in enumerate(curves)
    )
    return str(Markup(PAGE).format(Markup(STYLE + style), plot, legend))


if __name__ == "__main__":
    main()
