"""twofold plan --base B [--r 16 --target-modules all-linear --sequence-length 1024 --memory 24GB --compare ...]"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import gigabytes, stdout
from twofold.recipes.measure import measure
from twofold.recipes.plan import PlanSettings, compare, plan

DESCRIPTION = (
    "Parameters (exact), memory and time (estimated) of a training, from shapes alone. --explain shows each formula, "
    "--compare sets full fine-tuning, LoRA and QLoRA side by side, --measure takes real steps beside the estimate."
)


@dataclass(frozen=True, kw_only=True)
class PlanFlags(PlanSettings):
    """What a training costs."""

    loop: Annotated[Literal["twofold", "peft"], tyro.conf.arg(name="as")] = PlanSettings.loop


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    arguments, explain = take(arguments, "--explain")
    arguments, side_by_side = take(arguments, "--compare")
    arguments, measuring = take(arguments, "--measure")
    flags = parse(PlanFlags, arguments, verb="plan", description=DESCRIPTION)
    if side_by_side:
        methods = compare(flags)
        print_json(methods) if as_json else _show_methods(methods)
        return 0
    found = plan(flags)
    if measuring:
        found["measured"] = measure(flags)
    if as_json:
        print_json(found)
        return 0
    _show(found)
    if explain:
        _show_formulas(found)
    return 0


def _show(found: Mapping[str, Any]) -> None:
    parameters = found["parameters"]
    stdout.print(
        f"{parameters['trainable']:,} of {parameters['base']:,} parameters train ({parameters['fraction']:.2%}) in "
        f"{parameters['modules']} modules; the adapter's file takes {gigabytes(found['adapter_file_bytes'])}"
    )
    _show_memory(found)
    if found["time"]:
        time = found["time"]
        stdout.print(
            f"  {'time':<12} {_seconds(time['seconds_per_step']):>10} a step, {time['tokens_per_second']:,.0f} tokens/s "
            f"by this machine's {time['products_per_second'] / 1e9:,.0f} GFLOP/s"
        )
    if "measured" in found:
        _show_measured(found)
    if "budget" in found:
        _show_budget(found["budget"])
    for advice in found["advice"]:
        stdout.print(f"  advice: {advice}")


def _show_memory(found: Mapping[str, Any]) -> None:
    """The terms, and beside them those of each device where several share the work."""
    columns = {"": found["memory"]}
    if "devices" in found:
        devices = found["devices"]
        columns = {f"each of {devices['count']}, whole": devices["data_parallel"], "base shared": devices["sharded"]}
    if len(columns) > 1:
        stdout.print(" " * 14 + "".join(f"{name:>22}" for name in columns))
    width = 10 if len(columns) == 1 else 22
    for term in list(columns.values())[-1]:
        if term != "total" and any(c.get(term) for c in columns.values()):
            stdout.print(f"  {term:<12}" + "".join(f"{gigabytes(c.get(term, 0)):>{width}}" for c in columns.values()))
    totals = [c["total"] for c in columns.values()]
    stdout.print(f"  {'total':<12}" + "".join(f"{gigabytes(t['expected']):>{width}}" for t in totals))
    low, high = gigabytes(totals[0]["low"]), gigabytes(totals[0]["high"])
    stdout.print(f"  {'':<12} estimated: {low} to {high}, by the {LOOPS[found['loop']]}")


LOOPS = {
    "fast": "fast path",
    "plain": "plain path",
    "peft": "usual loop of transformers and PEFT",
    "full": "usual loop of transformers",
}


def _show_measured(found: Mapping[str, Any]) -> None:
    measured, memory = found["measured"], found["memory"]
    predicted = memory["total"]["expected"] - memory["proof"]  # which comes after the steps
    off = predicted / measured["peak_bytes"] - 1
    stdout.print(f"  measured     {gigabytes(measured['peak_bytes']):>10} at the peak: the estimate is {off:+.1%} off")
    taken = f"  measured     {_seconds(measured['seconds_per_step']):>10} a step"
    if found["time"]:
        taken += f": the estimate is {found['time']['seconds_per_step'] / measured['seconds_per_step'] - 1:+.0%} off"
    stdout.print(taken)


def _show_budget(budget: Mapping[str, Any]) -> None:
    stdout.print(f"  of {gigabytes(budget['bytes'])} of memory: {budget['verdict']}")
    if budget["verdict"] != "fits":
        for change in budget["changes"]:
            stdout.print(f"    {gigabytes(change['saves']):>10} less: {change['change']}; then: {change['verdict']}")


def _show_methods(methods: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for method in methods:
        table.add_column({"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}[method], justify="right")
    plans = list(methods.values())
    table.add_row("parameters that train", *(f"{p['parameters']['trainable']:,}" for p in plans))
    for term in plans[0]["memory"]:
        if term != "total" and any(p["memory"][term] for p in plans):
            table.add_row(term, *(gigabytes(p["memory"][term]) for p in plans))
    table.add_row("total", *(gigabytes(p["memory"]["total"]["expected"]) for p in plans), style="bold")
    table.add_row("by the", *(LOOPS[p["loop"]] for p in plans), style="dim")
    stdout.print(table)


def _show_formulas(found: Mapping[str, Any]) -> None:
    stdout.print("\n  each term, in bytes")
    for name, formula in found["formulas"].items():
        stdout.print(f"    {name:<12} = {formula}")
    stdout.print("\n  where")
    for name, symbol in found["symbols"].items():
        stdout.print(f"    {name:<12} = {symbol['value']:<14,.6g} {symbol['meaning']}")


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds / 60:,.1f} min"
