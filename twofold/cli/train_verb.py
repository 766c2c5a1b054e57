"""twofold train CONFIG.yaml [--adapter.r 32 ...] [--resume] [--dry-run]"""

from __future__ import annotations

from pathlib import Path

from twofold.cli.flags import given_flags, parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import Terminal, duration, gigabytes, show_preflight, stdout
from twofold.config import read_yaml
from twofold.recipes.settings import TrainConfig, check_continues, read_config
from twofold.recipes.train import dry_run, train


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    arguments, resume = take(arguments, "--resume")
    arguments, only_look = take(arguments, "--dry-run")
    config = _config(arguments)
    with Terminal() as terminal:
        if only_look:
            found = dry_run(config, terminal)
            print_json(found.as_json()) if as_json else show_preflight(found, stdout)
            return 0
        report = train(config, terminal, resume=resume)
    print_json(report) if as_json else _show(report)
    return 0


def _config(arguments: list[str]) -> TrainConfig:
    """The file, if one is named first, with the flags over it."""
    description = (
        "Train an adapter: twofold train CONFIG.yaml, any key of which may be overridden by its flag. "
        "--resume goes on from the newest checkpoint, --dry-run stops before the first step, --json prints the report."
    )
    file = read_config(Path(arguments[0])) if arguments and not arguments[0].startswith("-") else None
    flags = arguments[1:] if file else arguments
    bare = ("--json", "--resume", "--dry-run")
    config = parse(TrainConfig, flags, verb="train", description=description, default=file, bare=bare)
    given = [f.removeprefix("--adapter.").replace("-", "_") for f in given_flags(flags) if f.startswith("--adapter.")]
    check_continues(config.adapter, [*given, *(read_yaml(Path(arguments[0])).get("adapter", {}) if file else ())])
    return config


def _show(report: dict) -> None:  # type: ignore[type-arg]
    speed = f"{report['tokens_per_second']:,.0f} tokens/s, peak {gigabytes(report['peak_memory_bytes'])}"
    stdout.print(f"{report['steps']} steps in {duration(report['seconds'])}, {speed}")
    for name, found in report["evaluation"].items():
        if found:
            stdout.print(
                f"  held-out loss, {name:<8} {found['loss']:.4f}   token accuracy {found['token_accuracy']:.1%}"
            )
    proof = report["verification"]
    if proof:
        stdout.print(
            f"  proof {'passed' if proof['passed'] else 'FAILED'}: merged against adapter differ by at most "
            f"{proof['max_abs_logit_difference']:.3g} in a logit (noise allows {proof['tolerance']:.3g}, "
            f"scale 0 gives {proof['control_difference']:.3g}); base unchanged: {report['base_unchanged']}"
        )
    stdout.print(f"  adapter {report['adapter']}   report {report['run']}/report.html")
