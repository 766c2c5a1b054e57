"""twofold train CONFIG.yaml [--adapter.r 32 ...] [--resume] [--dry-run] [--find-lr] [--full]"""

from __future__ import annotations

from contextlib import nullcontext

from twofold.cli import find_lr
from twofold.cli.flags import take
from twofold.cli.main import print_json
from twofold.cli.run_flags import config_from
from twofold.cli.terminal import Terminal, show_preflight, speed_of, stdout
from twofold.events import silent
from twofold.recipes.settings import TrainConfig
from twofold.recipes.train import dry_run, train
from twofold.training.stopping import stopping
from twofold.world import from_environment, started_again


def run(arguments: list[str]) -> int:
    arguments, only_search = take(arguments, "--find-lr")
    if only_search:
        return find_lr.run(arguments)
    arguments, as_json = take(arguments, "--json")
    arguments, resume = take(arguments, "--resume")
    arguments, only_look = take(arguments, "--dry-run")
    config = config_from(arguments, TrainConfig)
    main = from_environment().main
    if only_look:
        return _look(config, as_json=as_json) if main else 0
    with Terminal() as terminal, stopping.heeded() if from_environment().size == 1 else nullcontext():
        report = train(config, terminal if main else silent, resume=resume or started_again())
    if main:
        print_json(report) if as_json else _show(report)
    return 0


def _look(config: TrainConfig, *, as_json: bool) -> int:
    with Terminal() as terminal:
        found = dry_run(config, terminal)
        print_json(found.as_json()) if as_json else show_preflight(found, stdout)
    return 0


def _show(report: dict) -> None:  # type: ignore[type-arg]
    stdout.print(speed_of(report))
    for name, found in report["evaluation"].items():
        if found:
            what = "accuracy" if "accuracy" in found else "token_accuracy"
            stdout.print(f"  held-out loss, {name:<8} {found['loss']:.4f}   {what.replace('_', ' ')} {found[what]:.1%}")
    proof = report["verification"]
    if proof:
        stdout.print(
            f"  proof {'passed' if proof['passed'] else 'FAILED'}: merged against adapter differ by at most "
            f"{proof['max_abs_logit_difference']:.3g} in a logit (noise allows {proof['tolerance']:.3g}, "
            f"scale 0 gives {proof['control_difference']:.3g}); base unchanged: {report['base_unchanged']}"
        )
    made = f"adapter {report['adapter']}" if report["adapter"] else f"model {report['model']}"
    stdout.print(f"  {made}   report {report['run']}/report.html")
