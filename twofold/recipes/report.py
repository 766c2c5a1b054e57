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

import jinja2
import yaml
from markupsafe import Markup

from twofold import atomic
from twofold.recipes import charts
from twofold.recipes.charts import significant
from twofold.recipes.runs import RunFolder

TEMPLATE = "report.html.j2"
NONE = "–"
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
class Table:
    """Rows whose first cell is their heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]


@dataclass(frozen=True)
class Proved:
    """The verdict: `state` is passed, failed or absent."""

    state: str
    sentence: str
    comparisons: Sequence[Table]


@dataclass(frozen=True)
class Sample:
    """An example's tokens: their class and their text with whitespace made visible."""

    title: str
    tokens: Sequence[tuple[str, str]]


def write_page(path: Path, report: dict[str, Any], preflight: dict[str, Any], events: list[dict[str, Any]]) -> None:
    """Write the page of a run; the run's settings are read from the config.yaml beside it, if there is one."""
    settings = _settings(RunFolder(path.parent).config)
    atomic.write_text(path, render(report, preflight, events, settings))


def render(
    report: Mapping[str, Any],
    preflight: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> str:
    """The page as HTML."""
    steps = [e for e in events if e.get("event") == "step"]
    return _template().render(
        run=Path(str(report.get("run") or "run")).name,
        base=str(report.get("base") or "unknown base"),
        finished=_finished(events),
        headline=headline(report),
        proof=proof(report),
        base_unchanged=base_sentence(report),
        cards=cards(report, steps),
        loss=charts.loss_figure(report, events, steps),
        figures=charts.small_figures(steps),
        steps=charts.thin(steps, TABLE_STEPS),
        all_steps=len(steps),
        losses=before_and_after(report),
        scores=score_table(report.get("task")),
        answers=answer_tables(report.get("task")),
        cut=cut_sentence(preflight),
        sets=_sets(preflight),
        samples=[sample(i, s) for i, s in enumerate(preflight.get("samples") or [], 1)],
        warnings=_warnings(preflight, events),
        facts=facts(report, preflight),
        settings=sorted(_flat(settings)),
    )


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page.filters.update(figure=shown, memory=lambda v: shown(v, memory), significant=lambda v: shown(v, significant))
    return page.get_template(TEMPLATE)


# --- words -----------------------------------------------------------------------------------------------------------


def dig(value: Any, *keys: str) -> Any:
    """A value inside nested mappings; None as soon as something is absent."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def shown(value: Any, form: str | Callable[[float], str]) -> str:
    """A number in a format, or a dash where there is none."""
    if value is None:
        return NONE
    return form(value) if callable(form) else format(value, form)


def memory(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def magnitude(count: float) -> str:
    """A count, in millions or billions where it is that large."""
    for size, name in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,}"


def _finished(events: Sequence[Mapping[str, Any]]) -> str | None:
    times = [e["time"] for e in events if "time" in e]
    return f"{datetime.fromtimestamp(times[-1], UTC):%Y-%m-%d %H:%M} UTC" if times else None


def headline(report: Mapping[str, Any]) -> str:
    """The outcome in one sentence."""
    before, after = dig(report, "evaluation", "base", "loss"), dig(report, "evaluation", "adapter", "loss")
    if before is None or after is None:
        return "Trained without held-out data, so nothing here says how well it generalises."
    if f"{before:.3f}" == f"{after:.3f}":
        return f"Held-out loss stayed at {before:.3f}."
    return f"Held-out loss {'fell' if after < before else 'rose'} from {before:.3f} to {after:.3f}."


# --- cards -----------------------------------------------------------------------------------------------------------


def cards(report: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[Card]:
    """The run at a glance."""
    return [_steps(report, steps), _time(report), _speed(report, steps), _memory(report, steps), _parameters(report)]


def _steps(report: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Card:
    details = [f"{e:.3g} epoch{'s' if e > 1 else ''}" for s in steps[-1:] if (e := s.get("epoch"))]
    if report.get("best_step"):
        details.append(f"the adapter is step {report['best_step']:,}'s, the best")
    return Card("Steps", shown(report.get("steps"), ","), details)


def _time(report: Mapping[str, Any]) -> Card:
    took, expected = report.get("seconds"), dig(report, "predicted", "seconds")
    if not took or not expected:
        return Card("Training time", shown(took, duration))
    details = [f"predicted {duration(expected)}", f"{took / expected:.2g} × the prediction"]
    return Card("Training time", duration(took), details, charts.gauge(took, expected))


def _speed(report: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Card:
    speeds = [s["tokens_per_second"] for s in steps if s.get("tokens_per_second")]
    details = [f"{statistics.median(speeds):,.0f} in the median step"] if speeds else []
    tokens, supervised = report.get("tokens"), report.get("supervised_tokens")
    if tokens:
        details.append(f"{tokens:,} tokens, {shown(supervised, ',')} supervised")
    return Card("Tokens per second", shown(report.get("tokens_per_second"), ",.0f"), details)


def _memory(report: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Card:
    peak, foreseen = report.get("peak_memory_bytes"), dig(report, "predicted", "memory", "total")
    if not peak or not foreseen:
        return Card("Peak memory", shown(peak, memory))
    low, expected, high = (foreseen[k] for k in ("low", "expected", "high"))
    details = [f"predicted {memory(expected)}, between {memory(low)} and {memory(high)}"]
    if held := max((s.get("memory_bytes") or 0 for s in steps), default=0):
        details.append(f"{memory(held)} at most after a step")
    return Card("Peak memory", memory(peak), details, charts.gauge(peak, expected, (low, high)))


def _parameters(report: Mapping[str, Any]) -> Card:
    found = report.get("parameters") or {}
    details = [f"{shown(found.get('fraction'), '.2%')} of the base's {shown(found.get('base'), magnitude)}"]
    if found.get("modules"):
        details.append(f"in {found['modules']:,} modules")
    return Card("Trainable parameters", shown(found.get("trainable"), magnitude), details)


# --- tables ----------------------------------------------------------------------------------------------------------


def before_and_after(report: Mapping[str, Any]) -> Table | None:
    """Held-out figures of the base, the adapter, and the two merged."""
    found = report.get("evaluation") or {}
    measured = [(name, figures) for name in ("base", "adapter", "merged") if (figures := found.get(name))]
    if not measured:
        return None
    counts = [shown(measured[0][1].get(key), ",") for key in ("examples", "tokens")]
    rows = [[name.capitalize(), *_loss_cells(figures, found.get("base"))] for name, figures in measured]
    caption = f"Measured on {counts[0]} held-out examples with {counts[1]} supervised tokens"
    return Table(caption, ["Model", "Loss", "Token accuracy", "Loss against the base"], rows)


def _loss_cells(figures: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[str]:
    loss, accuracy = figures.get("loss"), figures.get("token_accuracy")
    return [shown(loss, ".4f"), shown(accuracy, ".2%"), _change(figures, base)]


def _change(figures: Mapping[str, Any], base: Mapping[str, Any] | None) -> str:
    own, reference = figures.get("loss"), (base or {}).get("loss")
    if figures is base or not own or not reference:
        return NONE
    return f"{own / reference - 1:+.1%}".replace("-", "−")


def score_table(task: Mapping[str, Any] | None) -> Table | None:
    """How often each way of doing the task is right."""
    rows = [
        [s["name"], _score(s.get("intent_exact")), _score(s.get("whole_exact")), shown(s.get("sentences"), ",")]
        for s in (task or {}).get("scores") or []
    ]
    head = ["Model", "Intent", "Whole answer", "Sentences"]
    return Table("Answers that are exactly right", head, rows) if rows else None


def _score(value: float | None) -> str | Markup:
    if value is None:
        return NONE
    return Markup('<span class="score">{:.1%}{}</span>').format(value, charts.bar(value, 1.0))


def answer_tables(task: Mapping[str, Any] | None) -> list[Table]:
    """Each sample as a table of what was expected and what the base and the adapter said."""
    return [_answers(s) for s in (task or {}).get("samples") or []]


def _answers(sample: Mapping[str, Any]) -> Table:
    expected, base, adapter = (str(sample.get(key) or "") for key in ("expected", "base", "adapter"))
    rows = [["Expected", expected, ""], ["Base", base, _match(base, expected)]]
    rows.append(["Adapter", adapter, _match(adapter, expected)])
    return Table(str(sample.get("prompt") or ""), ["Who", "Answer", "Right"], rows)


def _match(answer: str, expected: str) -> str:
    return "✓ same" if same(answer, expected) else "✗ differs"


def same(answer: str, expected: str) -> bool:
    """Equal as JSON where both are, else as text."""
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except ValueError:
        return answer.strip() == expected.strip()


# --- proof -----------------------------------------------------------------------------------------------------------


def proof(report: Mapping[str, Any]) -> Proved:
    """The verdict over every comparison that was made."""
    against = {"the merged model": report.get("verification"), "PEFT": report.get("peft")}
    made = {what: v for what, v in against.items() if v}
    failed = [f"{what} does not say what the adapter says" for what, v in made.items() if not v.get("passed")]
    if report.get("base_unchanged") is False:
        failed.append("the base's weights changed during training")
    tables = [_comparison(what, v) for what, v in made.items()]
    if failed:
        return Proved("failed", f"Proof FAILED: {' and '.join(failed)}. Do not use this adapter.", tables)
    if not made:
        return Proved("absent", "Not proved: no verification was run, so no logits were compared.", tables)
    what = f"{' and '.join(made)} say{'s' * (len(made) == 1)} what the adapter says"
    intact = ", and the base is bit for bit what it was" if report.get("base_unchanged") else ""
    return Proved("passed", f"Proof passed: {what}{intact}.", tables)


def base_sentence(report: Mapping[str, Any]) -> str | None:
    """Whether training left the base alone; None where nobody looked."""
    unchanged = report.get("base_unchanged")
    if unchanged is None:
        return None
    return f"The base's weights were hashed before and after: {'not one bit changed' if unchanged else 'THEY CHANGED'}."


def _comparison(what: str, found: Mapping[str, Any]) -> Table:
    difference, tolerance = found.get("max_abs_logit_difference"), found.get("tolerance")
    control, agreement = found.get("control_difference"), found.get("top1_agreement")
    top = max(v for v in (difference, tolerance, control, 0.0) if v is not None)
    rows = [
        ["Largest difference of a logit", *_measured(difference, top, tolerance)],
        ["Tolerance", *_measured(tolerance, top, tolerance)],
        ["Control: the adapter switched off", *_measured(control, top, tolerance)],
        ["Same likeliest token", shown(agreement, ".1%"), "" if agreement is None else charts.bar(agreement, 1.0)],
    ]
    verdict = "passed" if found.get("passed") else "FAILED"
    return Table(f"The adapter against {what}: {verdict}", ["Compared", "Value", "Drawn"], rows)


def _measured(value: float | None, top: float, limit: float | None) -> tuple[str, str | Markup]:
    return (NONE, "") if value is None else (significant(value), charts.bar(value, top, limit))


# --- data ------------------------------------------------------------------------------------------------------------


def _sets(preflight: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    named = {"Training": preflight.get("train"), "Held out": preflight.get("evaluation")}
    return {name: found for name, found in named.items() if found}


def cut_sentence(preflight: Mapping[str, Any]) -> str:
    """What truncation did, in a sentence."""
    sets = _sets(preflight).values()
    over, lost = (sum(d.get(k) or 0 for d in sets) for k in ("too_long", "lost_supervised_tokens"))
    if not over:
        return "Nothing was cut off: no example is over the length limit."
    return f"{over:,} examples are over the length limit; {lost:,} supervised tokens were lost to it."


def sample(number: int, tokens: Sequence[Sequence[Any]]) -> Sample:
    """A sample's tokens; of a very long one the beginning and the end."""
    supervised = sum(bool(s) for _, s in tokens)
    shown_tokens = [_token(str(text), bool(s)) for text, s in tokens]
    if (hidden := len(tokens) - SAMPLE_TOKENS) > 0:
        half = SAMPLE_TOKENS // 2
        shown_tokens[half:-half] = [("gap", f"\n… {hidden:,} tokens not shown …\n")]
    return Sample(f"Example {number}: {len(tokens):,} tokens, {supervised:,} supervised", shown_tokens)


def _token(text: str, supervised: bool) -> tuple[str, str]:
    kind = "special " if SPECIAL.fullmatch(text) else ""
    return kind + ("supervised" if supervised else "context"), text.translate(VISIBLE)


def _warnings(preflight: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of the pre-flight and those of the run, each once."""
    said = [str(e.get("text", "")) for e in events if e.get("event") == "warned"]
    return list(dict.fromkeys([*map(str, preflight.get("warnings") or []), *said]))


# --- settings --------------------------------------------------------------------------------------------------------


def facts(report: Mapping[str, Any], preflight: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where and how the run ran."""
    found = {
        "device": report.get("device"),
        "dtype": report.get("dtype"),
        "path": preflight.get("path"),
        "training data, SHA-256": dig(preflight, "train", "digest"),
        "held-out data, SHA-256": dig(preflight, "evaluation", "digest"),
    }
    return [(k, str(v)) for k, v in found.items() if v is not None]


def _settings(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) else {}


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys; those left unset say nothing."""
    lines: list[tuple[str, str]] = []
    for key, found in value.items():
        if isinstance(found, Mapping):
            lines += _flat(found, f"{prefix}{key}.")
        elif found is not None and found != []:
            lines.append((f"{prefix}{key}", str(found)))
    return lines
