"""twofold demo"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import Terminal, gigabytes, speed_of, stdout
from twofold.recipes.demo import DemoConfig, attribution, demo


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    config = parse(DemoConfig, arguments, verb="demo", description="The main job on the embedded default, end to end.")
    with Terminal() as terminal:
        report = demo(config, terminal)
    print_json(report) if as_json else show(report)
    return 0


def show(report: dict[str, Any]) -> None:
    """What the demonstration found, in the order of a reader's questions."""
    stdout.print(f"\n[bold]Training[/bold]  {speed_of(report)}")
    _show_scores(report)
    _show_samples(report["task"]["samples"])
    _show_proof(report)
    _show_places(report)


def _show_scores(report: dict[str, Any]) -> None:
    loss = report["evaluation"]
    stdout.print(
        f"\n[bold]Before and after[/bold], on {report['task']['scores'][0]['sentences']} sentences of held-out templates"
    )
    for name in ("base", "adapter"):
        stdout.print(f"  {name:<8} loss {loss[name]['loss']:.3f}   token accuracy {loss[name]['token_accuracy']:.1%}")
    table = Table("", "intent exact", "whole JSON exact", box=None, header_style="bold", padding=(0, 2))
    for score in report["task"]["scores"]:
        table.add_row(score["name"], f"{score['intent_exact']:.1%}", f"{score['whole_exact']:.1%}")
    stdout.print(table)


def _show_samples(samples: list[dict[str, str]]) -> None:
    stdout.print("\n[bold]Side by side[/bold]")
    for sample in samples:
        stdout.print(f"  {sample['prompt']}", style="bold", markup=False)
        for name in ("expected", "adapter", "base"):
            stdout.print(f"    {name:<9} {' '.join(sample[name].split())[:150]}", markup=False, soft_wrap=True)


def _show_proof(report: dict[str, Any]) -> None:
    stdout.print("\n[bold]Proof[/bold]")
    stdout.print(f"  base tensors bit-identical to before: {'yes' if report['base_unchanged'] else 'NO'}")
    _show_comparison("merged model, read back from disk", report["merge"]["verification"])
    if report["peft"] is None:
        stdout.print(
            "  PEFT is not installed here, so its own loading of the adapter was not compared (make test does)"
        )
    else:
        _show_comparison("PEFT's own loading of the adapter", report["peft"])


def _show_comparison(what: str, found: dict[str, Any] | None) -> None:
    if found is None:
        return stdout.print(f"  {what}: not compared, for memory ran out")
    stdout.print(
        f"  {what}: {'passed' if found['passed'] else 'FAILED'}; logits differ by at most "
        f"{found['max_abs_logit_difference']:.2g}, same likeliest token at {found['top1_agreement']:.1%} of positions"
    )
    stdout.print(
        f"    tolerance {found['tolerance']:.2f} is the noise of serving both in this precision, measured; the control, the "
        f"adapter at scale 0, differs by {found['control_difference']:.2f} and fails, as it must",
        style="dim",
    )


def _show_places(report: dict[str, Any]) -> None:
    run, sizes = report["run"], report["sizes"]
    stdout.print("\n[bold]Where it lies[/bold]")
    stdout.print(f"  adapter  {report['adapter']}  {gigabytes(sizes['adapter'])}")
    stdout.print(f"  merged   {report['merge']['output']}  {gigabytes(sizes['merged'])}")
    stdout.print(f"  report   {run}/report.html")
    stdout.print(f"  from     {attribution()}", style="dim")
    system = "Turn the home command into a JSON intent."
    stdout.print("\n[bold]Next[/bold]")
    for command in (
        f'twofold generate --adapter {report["adapter"]} --system "{system}" "dim the hallway lamp to 20 percent"',
        f"twofold inspect {report['adapter']}",
        f"twofold train {run}/config.yaml --output runs/mine --adapter.r 32",
    ):
        stdout.print(f"  {command}", markup=False, soft_wrap=True)
