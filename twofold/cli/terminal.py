"""The terminal as a subscriber: bars where a person watches, plain lines where a log does; all of it on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from twofold import events
from twofold.recipes.preflight import Preflight, Prepared

SECONDS_BETWEEN_LINES = 5.0
LOG_WIDTH = 160
"""Columns where nobody watches: a log is not wrapped at a terminal's width."""


class Piped(Console):
    """A console that leaves a reader who has gone to `main`."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


stderr = Piped(stderr=True, highlight=False, width=None if sys.stderr.isatty() else LOG_WIDTH)
stdout = Piped(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH, soft_wrap=not sys.stdout.isatty())


class Terminal:
    """Shows events; use it as a context manager, so that bars are taken down whatever happens."""

    def __init__(self) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=stderr,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0

    def __enter__(self) -> Terminal:
        if stderr.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if stderr.is_terminal:  # elsewhere it would leave an empty line behind
            self._bars.stop()

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.Progress():
                self._advance(event.task, event.done, event.total, "")
            case events.Step():
                self._advance("training", event.step, event.steps, figures(event))
            case events.Evaluated():
                best = ", best so far" if event.best else ""
                stderr.print(
                    f"  step {event.step}: held-out loss {event.loss:.4f}, accuracy {event.token_accuracy:.1%}{best}"
                )
            case events.Message():
                stderr.print(Text(event.text, style="dim"))
            case events.Warned():
                stderr.print(Text(f"warning: {event.text}", style="yellow"))
            case Prepared():
                show_preflight(event.preflight)

    def _advance(self, task: str, done: int, total: int | None, shown: str) -> None:
        if stderr.is_terminal:
            if task not in self._tasks:
                self._tasks[task] = self._bars.add_task(task, total=total, figures="")
            self._bars.update(self._tasks[task], completed=done, total=total, figures=shown)
            if done == total:
                self._bars.update(self._tasks[task], visible=False)
        now = time.monotonic()
        if done == total or (not stderr.is_terminal and now - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = now
            stderr.print(f"  {task} {done}/{total or '?'} {shown}".rstrip())


def figures(event: events.Step) -> str:
    """One step's figures in a line."""
    return (
        f"loss {event.loss:.3f}  rate {event.learning_rate:.1e}  gradient {event.gradient_norm:.2f}  "
        f"{event.tokens_per_second:,.0f} tokens/s  {gigabytes(event.memory_bytes)}  {duration(event.seconds_left)} left"
    )


def speed_of(report: dict[str, Any]) -> str:
    """Steps, time, tokens a second and peak memory of a run; and how near the machine's limit it ran, where that was measured."""
    told = f"{report['steps']} steps in {duration(report['seconds'])}, {report['tokens_per_second']:,.0f} tokens/s, "
    told += f"peak {gigabytes(report['peak_memory_bytes'])}"
    floor = report["floor"]
    return told if floor is None else f"{told}; matrix products alone take {floor['fraction']:.0%} of the median step"


def gigabytes(count: float) -> str:
    """Bytes in GB, or MB below a tenth of one."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def show_preflight(found: Preflight, console: Console = stderr) -> None:
    """What a run will do and cost, and two examples token by token."""
    train, memory = found.train, found.memory.as_json()["total"]
    console.print("[bold]Pre-flight[/bold]")
    console.print(
        f"  data        {train.examples:,} examples, {train.tokens:,} tokens, {train.supervised_tokens:,} supervised "
        f"({train.supervised_tokens / train.tokens:.0%}); format {train.format}, columns {', '.join(train.columns)}"
    )
    if train.classes:
        counted = ", ".join(f"{name} ({count:,})" for name, count in train.classes.items())
        console.print(f"  classes     {len(train.classes)}: {counted}")
    console.print(
        f"  truncation  {train.too_long} examples over the limit, {train.lost_supervised_tokens} supervised tokens lost; "
        f"the longest has {train.longest} tokens"
    )
    if found.evaluation:
        console.print(
            f"  held out    {found.evaluation.examples:,} examples, {found.evaluation.supervised_tokens:,} supervised tokens"
        )
    what = "adapter" if found.parameters.ranks else "full"
    console.print(
        f"  {what:<10}  {found.parameters.trainable:,} parameters train, {found.parameters.fraction:.2%} of the base's "
        f"{found.parameters.base:,}, in {found.parameters.modules} modules"
    )
    console.print(
        f"  cost        about {gigabytes(memory['expected'])} of memory ({gigabytes(memory['low'])} to "
        f"{gigabytes(memory['high'])}), about {duration(found.seconds)} for {found.steps} steps; {found.path}"
    )
    remembered = f"; states of frozen layers take up to {gigabytes(found.remembered)}" if found.remembered else ""
    console.print(
        f"  sharing     {found.rows:,} of the first step's {found.tokens:,} tokens are computed: what examples begin with alike "
        f"once, and nothing behind the last prediction{remembered}"
    )
    for sample in found.samples:
        show_tokens(sample, console)


def show_tokens(sample: list[tuple[str, bool]], console: Console) -> None:
    """One example, token by token: supervised tokens green and underlined, the borders between tokens as thin bars."""
    text = Text("  ")
    for token, supervised in sample:
        visible = token.replace("\n", "⏎\n  " if token.strip("\n") == "" else "⏎")
        text.append(
            visible if visible.strip() else visible.replace(" ", "·"), "green underline" if supervised else "dim"
        )
        text.append("|", "bright_black")
    console.print(Text("  example (green and underlined: supervised)", style="italic"))
    console.print(text)
