"""report.html: the run's report as one page that opens from disk without a network.

Here the figures become words, tables and charts; `report.html.j2` only lays them out, and escapes whatever came from
data. Anything may be absent (no held-out data, no proof, no demo's task): its section then says so in a sentence.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from twofold import atomic
from twofold.recipes import charts
from twofold.recipes.charts import Json, Number, significant
from twofold.recipes.others import others_table
from twofold.recipes.pages import template
from twofold.recipes.runs import RunFolder
from twofold.recipes.words import NONE, Table, dig, duration, magnitude, memory, shown

SAMPLE_TOKENS, TABLE_STEPS = 1200, 24
"""The most tokens shown of a sample, and rows of the table behind the charts."""
SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
CONTROLS = {chr(i): chr(0x2400 + i) for i in range(32)}
VISIBLE = str.maketrans({**CONTROLS, "\n": "↵\n", "\t": "⇥", " ": "·", "\x7f": "␡"})


@dataclass(frozen=True)
class Card:
    """One figure of the run, with a line of context."""

    label: str
    value: str
    details: Sequence[str] = ()
    gauge: Markup | None = None


@dataclass(frozen=True)
class Proved:
    """The verdict: `state` is passed, failed or absent."""

    state: str
    sentence: str
    comparisons: Sequence[Table]


@dataclass(frozen=True)
class Sample:
    """An example's tokens: class, text with whitespace made visible, and the line ends that follow it."""

    title: str
    tokens: Sequence[tuple[str, str, str]]


def write_page(path: Path, report: dict[str, Any], preflight: dict[str, Any], events: list[dict[str, Any]]) -> None:
    """Write the page of a run; the run's settings are read from the config.yaml beside it, if there is one."""
    settings = _settings(RunFolder(path.parent).config)
    atomic.write_text(path, render(report, preflight, events, settings))


def render(report: Json, preflight: Json, events: Sequence[Json], settings: Json) -> str:
    """The page as HTML."""
    steps = [e for e in events if e.get("event") == "step"]
    filters: dict[str, Callable[..., Any]] = {
        "figure": shown,
        "score": score,
        "memory": lambda v: shown(v, memory),
        "significant": lambda v: shown(v, significant),
    }
    return template("report.html.j2", filters).render(
        run=Path(str(report.get("run") or "run")).name,
        base=str(report.get("base") or "unknown base"),
        finished=_finished(events),
        headline=headline(report),
        proof=proof(report),
        base_unchanged=report.get("base_unchanged"),
        cards=cards(report, steps),
        loss=charts.loss_figure(report, events, steps),
        figures=charts.small_figures(steps),
        steps=charts.thin(steps, TABLE_STEPS),
        all_steps=len(steps),
        losses=before_and_after(report),
        others=others_table(report),
        scores=dig(report, "task", "scores") or [],
        answers=[answers(s) for s in dig(report, "task", "samples") or []],
        cut=cut_sentence(preflight),
        sets=_sets(preflight),
        samples=[sample(i, s) for i, s in enumerate(preflight.get("samples") or [], 1)],
        warnings=_warnings(preflight, events),
        settings=sorted({**dict(_flat(settings)), **facts(report, preflight)}.items()),
    )


# --- words -----------------------------------------------------------------------------------------------------------


def _finished(events: Sequence[Json]) -> str | None:
    times = [e["time"] for e in events if "time" in e]
    return f"{datetime.fromtimestamp(times[-1], UTC):%Y-%m-%d %H:%M} UTC" if times else None


def headline(report: Json) -> str:
    """The outcome in one sentence."""
    before, after = dig(report, "evaluation", "base", "loss"), dig(charts.trained(report), "loss")
    if before is None or after is None:
        return "Trained without held-out data, so nothing here says how well it generalises."
    if f"{before:.3f}" == f"{after:.3f}":
        return f"Held-out loss stayed at {before:.3f}."
    verb = "fell" if after < before else "rose" if after > before else "went"
    return f"Held-out loss {verb} from {before:.3f} to {after:.3f}."


# --- cards -----------------------------------------------------------------------------------------------------------


def cards(report: Json, steps: Sequence[Json]) -> list[Card]:
    """The run at a glance."""
    return [_steps(report, steps), _time(report), _speed(report, steps), _memory(report, steps), _parameters(report)]


def _steps(report: Json, steps: Sequence[Json]) -> Card:
    details = [f"{e:.3g} epoch{'s' if e > 1 else ''}" for s in steps[-1:] if (e := s.get("epoch"))]
    if report.get("best_step"):
        details.append(f"kept the best, step {report['best_step']:,}")
    return Card("Steps", shown(report.get("steps"), ","), details)


def _time(report: Json) -> Card:
    took, expected = report.get("seconds"), dig(report, "predicted", "seconds")
    if not took or not expected:
        return Card("Training time", shown(took, duration))
    details = [f"predicted {duration(expected)}", f"{took / expected:,.1f} × the prediction"]
    return Card("Training time", duration(took), details, charts.gauge(took, expected))


def _speed(report: Json, steps: Sequence[Json]) -> Card:
    speeds = [s["tokens_per_second"] for s in steps if s.get("tokens_per_second")]
    details = [f"{statistics.median(speeds):,.0f} in the median step"] if speeds else []
    tokens, supervised = report.get("tokens"), report.get("supervised_tokens")
    if tokens:
        details.append(f"{tokens:,} tokens, {shown(supervised, ',')} supervised")
    if floor := dig(report, "floor", "fraction"):
        details.append(f"its matrix products alone take {floor:.0%} of the median step")
    return Card("Tokens per second", shown(report.get("tokens_per_second"), ",.0f"), details)


def _memory(report: Json, steps: Sequence[Json]) -> Card:
    peak, foreseen = report.get("peak_memory_bytes"), dig(report, "predicted", "memory", "total")
    if not peak or not foreseen:
        return Card("Peak memory", shown(peak, memory))
    low, expected, high = (foreseen[k] for k in ("low", "expected", "high"))
    details = [f"predicted {memory(expected)} ({memory(low)} to {memory(high)})"]
    if held := max((s.get("memory_bytes") or 0 for s in steps), default=0):
        details.append(f"at most {memory(held)} after a step")
    return Card("Peak memory", memory(peak), details, charts.gauge(peak, expected, (low, high)))


def _parameters(report: Json) -> Card:
    found = report.get("parameters")
    if not found:
        return Card("Trainable parameters", NONE)
    details = [f"{shown(found.get('fraction'), '.2%')} of the base's {shown(found.get('base'), magnitude)}"]
    if found.get("modules"):
        details.append(f"in {found['modules']:,} modules")
    return Card("Trainable parameters", shown(found.get("trainable"), magnitude), details)


# --- tables ----------------------------------------------------------------------------------------------------------


def before_and_after(report: Json) -> Table | None:
    """Held-out figures of the base, what was trained over it, and the two merged."""
    found = report.get("evaluation") or {}
    measured = [(name, figures) for name in ("base", "adapter", "full", "merged") if (figures := found.get(name))]
    if not measured:
        return None
    rows = [[name.capitalize(), *_loss_cells(figures, found.get("base"))] for name, figures in measured]
    first = measured[0][1]
    caption, accuracy = f"Measured on {shown(first.get('examples'), ',')} held-out examples", "Accuracy"
    if "accuracy" not in first:
        caption, accuracy = f"{caption} with {shown(first.get('tokens'), ',')} supervised tokens", "Token accuracy"
    return Table(caption, ["Model", "Loss", accuracy, "Loss against the base"], rows)


def _loss_cells(figures: Json, base: Json | None) -> list[str]:
    accuracy = figures.get("accuracy", figures.get("token_accuracy"))
    return [shown(figures.get("loss"), ".4f"), shown(accuracy, ".2%"), _change(figures, base)]


def _change(figures: Json, base: Json | None) -> str:
    own, reference = figures.get("loss"), (base or {}).get("loss")
    if figures is base or not own or not reference:
        return NONE
    return f"{own / reference - 1:+.1%}".replace("-", "−")


def score(value: Number | None) -> str | Markup:
    """A share as a number and a bar."""
    if value is None:
        return NONE
    return Markup('<span class="score">{:.1%}{}</span>').format(value, charts.bar(value, 1.0))


def answers(sample: Json) -> Table:
    """What was expected, and what the base and the adapter said."""
    expected = str(sample.get("expected") or "")
    rows: list[list[str | Markup]] = [["Expected", expected]]
    for name in ("base", "adapter"):
        said = str(sample.get(name) or "")
        match = "✓ same" if same(said, expected) else "✗ differs"
        rows.append([Markup("{}<small>{}</small>").format(name.capitalize(), match), said or "(nothing)"])
    return Table(str(sample.get("prompt") or ""), ["Who", "Answer"], rows)


def same(answer: str, expected: str) -> bool:
    """Equal as JSON where both are, else as text."""
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except (ValueError, RecursionError):
        return answer.strip() == expected.strip()


# --- proof -----------------------------------------------------------------------------------------------------------


def proof(report: Json) -> Proved:
    """The verdict over every comparison that was made."""
    against = {"the merged model": report.get("verification"), "PEFT": report.get("peft")}
    made = {what: v for what, v in against.items() if v}
    failed = [_failure(what, v) for what, v in made.items() if not v.get("passed")]
    if report.get("base_unchanged") is False:
        failed.append("the base's weights changed during training")
    tables = [_comparison(what, v) for what, v in made.items()]
    if failed:
        return Proved("failed", f"Proof FAILED: {'; '.join(failed)}.", tables)
    if not made:
        why = report.get("verification_skipped") or "no verification was run, so no logits were compared"
        return Proved("absent", f"Not proved: {why}.", tables)
    what = f"{' and '.join(made)} say{'s' * (len(made) == 1)} what the adapter says"
    intact = ", and the base is bit for bit what it was" if report.get("base_unchanged") else ""
    return Proved("passed", f"Proof passed: {what}{intact}.", tables)


def _failure(what: str, found: Json) -> str:
    """Either they differ, or the adapter does so little that agreement would show nothing."""
    difference, control = (found.get(k) or 0.0 for k in ("max_abs_logit_difference", "control_difference"))
    tolerance = found.get("tolerance") or 0.0
    if difference <= tolerance and control <= tolerance:
        return f"{what} cannot be told from the base, for the adapter moves no logit by more than the model's own noise"
    return (
        f"{what} differs from the adapter by {significant(difference)}, more than the model's own noise; do not use it"
    )


def _comparison(what: str, found: Json) -> Table:
    difference, tolerance = found.get("max_abs_logit_difference"), found.get("tolerance")
    control, agreement = found.get("control_difference"), found.get("top1_agreement")
    top = max(v for v in (difference, tolerance, control, 0.0) if v is not None)
    rows = [
        ["Largest difference of a logit", *_measured(difference, top, tolerance)],
        ["Tolerance, the line drawn", *_measured(tolerance, top, tolerance)],
        ["Control: the adapter switched off", *_measured(control, top, tolerance)],
        ["Same likeliest token", shown(agreement, ".1%"), "" if agreement is None else charts.bar(agreement, 1.0)],
    ]
    verdict = "passed" if found.get("passed") else "FAILED"
    return Table(f"The adapter against {what}: {verdict}", ["Compared", "Value", "Drawn"], rows)


def _measured(value: Number | None, top: Number, limit: Number | None) -> tuple[str, str | Markup]:
    return (NONE, "") if value is None else (significant(value), charts.bar(value, top, limit))


# --- data ------------------------------------------------------------------------------------------------------------


def _sets(preflight: Json) -> dict[str, Json]:
    named = {"Training": preflight.get("train"), "Held out": preflight.get("evaluation")}
    return {name: found for name, found in named.items() if found}


def cut_sentence(preflight: Json) -> str:
    """What truncation did, in a sentence."""
    sets = _sets(preflight).values()
    if not sets:
        return "No account of the data was kept."
    over, lost = (sum(d.get(k) or 0 for d in sets) for k in ("too_long", "lost_supervised_tokens"))
    if not over:
        return "Nothing was cut off: no example is over the length limit."
    return f"{over:,} example{'s are' if over > 1 else ' is'} over the length limit; {lost:,} supervised tokens were lost to it."


def sample(number: int, tokens: Sequence[Sequence[Any]]) -> Sample:
    """A sample's tokens; of a very long one the beginning and the end."""
    supervised = sum(bool(s) for _, s in tokens)
    visible = [_token(str(text), bool(s)) for text, s in tokens]
    if (hidden := len(tokens) - SAMPLE_TOKENS) > 0:
        half = SAMPLE_TOKENS // 2
        visible[half:-half] = [("gap", f"… {hidden:,} tokens not shown …", "\n")]
    return Sample(f"Example {number}: {len(tokens):,} tokens, {supervised:,} supervised", visible)


def _token(text: str, supervised: bool) -> tuple[str, str, str]:
    """Line ends that close a token come after its box, which would otherwise begin the next line."""
    kind = "special " if SPECIAL.fullmatch(text) else ""
    ends = len(text) - len(text.rstrip("\n"))
    body = text[: len(text) - ends].translate(VISIBLE) + "↵" * ends
    return kind + ("supervised" if supervised else "context"), body, "\n" * ends


def _warnings(preflight: Json, events: Sequence[Json]) -> list[str]:
    """Those of the pre-flight and those of the run, each once."""
    said = [str(e.get("text", "")) for e in events if e.get("event") == "warned"]
    return list(dict.fromkeys([*map(str, preflight.get("warnings") or []), *said]))


# --- settings --------------------------------------------------------------------------------------------------------


def facts(report: Json, preflight: Json) -> dict[str, str]:
    """Where and how the run ran, which stands above what was asked for."""
    found = {
        "device": report.get("device"),
        "dtype": report.get("dtype"),
        "processes": report.get("processes"),
        "training path": preflight.get("path"),
        "training data, SHA-256": dig(preflight, "train", "digest"),
        "held-out data, SHA-256": dig(preflight, "evaluation", "digest"),
    }
    return {k: str(v) for k, v in found.items() if v is not None}


def _settings(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) else {}


def _flat(value: Json, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys; those left unset say nothing."""
    lines: list[tuple[str, str]] = []
    for key, found in value.items():
        if isinstance(found, Mapping):
            lines += _flat(found, f"{prefix}{key}.")
        elif found is not None and found != []:
            text = yaml.safe_dump(found, default_flow_style=True, allow_unicode=True, width=10**6)
            lines.append((f"{prefix}{key}", text.removesuffix("...\n").strip()))
    return lines
