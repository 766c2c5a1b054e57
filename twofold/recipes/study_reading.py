"""What the trainings of a study say: a verdict in words, a table, pictures; with error bars wherever there are several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from twofold.adapter.files import open_adapter
from twofold.adapter.updates import updates_of
from twofold.lowrank.algebra import decomposed
from twofold.lowrank.spectra import subspace_similarity
from twofold.recipes.pictures import Series, picture, power_of_ten
from twofold.recipes.proving import medians
from twofold.recipes.studies import Reading, Study
from twofold.recipes.words import memory

Row = Mapping[str, Any]
Rows = Mapping[str, Row]
TOP = (1, 4, 8)
"""How many first directions are compared."""
ANSWERED = ("intent right", "answer right")
"""The shares of answers in the order of their columns."""


@dataclass(frozen=True)
class Found:
    """What there is to say; the table's first row is its head."""

    verdict: str
    table: list[list[str]]
    pictures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """One arm at its best rate, over its seeds; `spread` is the standard deviation, None of a lone seed."""

    arm: str
    rate: float
    rows: Sequence[Row]

    @property
    def losses(self) -> list[float]:
        return [r["loss"] for r in self.rows]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float | None:
        return _deviation(self.losses)

    @property
    def error(self) -> float:
        """The standard error of the mean; 0 where one seed leaves it unknown."""
        return 0.0 if self.spread is None else self.spread / math.sqrt(len(self.losses))


def read(study: Study, rows: Rows, folder: Path) -> Found:
    """The reading that a study asks for.

    Args:
        folder: of the study's trainings, in which its adapters lie.
    """
    readings: dict[Reading, Callable[[Study, Rows, Path], Found]] = {
        "best": _best,
        "forgetting": _forgetting,
        "rates": _rates,
        "cost": _cost,
        "spectra": _spectra,
        "proof": _proof,
    }
    return readings[study.reading](study, rows, folder)


def trained(study: Study, rows: Rows, arm: str) -> list[Row]:
    """The trainings of an arm that came to a finite loss."""
    return [r for r in rows.values() if r.get("arm") == arm and r["loss"] is not None and math.isfinite(r["loss"])]


def outcome(study: Study, rows: Rows, arm: str) -> Outcome:
    """An arm at the rate that did best: by the mean of the seeds where all rates have them, else by the first."""
    found: dict[float, list[Row]] = {}
    for row in trained(study, rows, arm):
        found.setdefault(row["rate"], []).append(row)
    most = max(map(len, found.values()))
    best = min(
        (rate for rate in found if len(found[rate]) == most),
        key=lambda r: statistics.fmean(x["loss"] for x in found[r]),
    )
    return Outcome(arm, best, found[best])


def _said(mean: float, spread: float | None, form: str = ".4f", spread_form: str = ".4f") -> str:
    return format(mean, form) if spread is None else f"{mean:{form}} ± {spread:{spread_form}}"


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _best(study: Study, rows: Rows, folder: Path) -> Found:
    found = [outcome(study, rows, arm.name) for arm in study.arms]
    reference = _reference(study, found)
    score = "accuracy" if study.material == "vader" else "token accuracy"
    untouched = rows["untouched"]
    scores = [score, *(ANSWERED if "answers" in untouched["probes"] else ())]
    table = [["", "trains", "best rate", "held-out loss", f"against {reference.arm}", *scores, "seeds"]]
    table.append(["untouched", "0", "–", f"{untouched['loss']:.4f}", "–", *_scores([untouched]), "–"])
    for o in found:
        change = "–" if o is reference else f"{o.mean / reference.mean - 1:+.1%}"
        first = [o.arm, _share(study, o, reference), f"{o.rate:g}", _said(o.mean, o.spread)]
        table.append([*first, change, *_scores(o.rows), str(len(o.rows))])
    drawn = _by_rate(study, rows)
    return Found(_against(found, reference) + _edges(study, found), table, drawn)


def _scores(rows: Sequence[Row]) -> list[str]:
    """The accuracy, and what the model's own answers came to, where it was asked."""
    each = [{"accuracy": row["accuracy"], **row["probes"].get("answers", {})} for row in rows]
    shares = [[scores[name] for scores in each] for name in ("accuracy", *ANSWERED) if name in each[0]]
    return [_said(statistics.fmean(share), _deviation(share), ".1%", ".1%") for share in shares]


def _reference(study: Study, found: Sequence[Outcome]) -> Outcome:
    """What the other arms are held against: full fine-tuning where it is among them, else the first."""
    return next((o for o, arm in zip(found, study.arms, strict=True) if arm.full), found[0])


def _share(study: Study, o: Outcome, reference: Outcome) -> str:
    """How many parameters train, and beside full fine-tuning which share of all."""
    count, all_of_them = o.rows[0]["parameters"], reference.rows[0]["parameters"]
    beside_full = any(arm.full for arm in study.arms) and o is not reference
    return f"{count:,} ({count / all_of_them:.2%})" if beside_full else f"{count:,}"


def _forgetting(study: Study, rows: Rows, folder: Path) -> Found:
    """The loss on texts of other kinds, of each arm at the rate that is best on its own task, and of all rates in the picture."""
    before = rows["untouched"]["probes"]["other-texts"]
    found, names = [outcome(study, rows, arm.name) for arm in study.arms], sorted(before)
    table = [["", "best rate", "held-out loss", *(f"loss on {n}" for n in names), "mean rise"]]
    untouched = [f"{rows['untouched']['loss']:.4f}", *(f"{before[n]:.4f}" for n in names)]
    table.append(["untouched", "–", *untouched, "–"])
    rises = {o.arm: [_rise(r, before) for r in o.rows] for o in found}
    for o in found:
        texts = [[r["probes"]["other-texts"][n] for r in o.rows] for n in names]
        cells = [_said(statistics.fmean(t), _deviation(t)) for t in texts]
        rise = f"{statistics.fmean(rises[o.arm]):+.4f}"
        table.append([o.arm, f"{o.rate:g}", _said(o.mean, o.spread), *cells, rise])
    series = [Series(arm.name, _learned_and_forgotten(trained(study, rows, arm.name), before)) for arm in study.arms]
    title = "Rise of the loss on other texts, by the held-out loss on the task: a point for each rate"
    drawn = {f"{study.name}.svg": picture(title, "held-out loss", series)}
    said = [
        f"{o.arm} {_said(statistics.fmean(rises[o.arm]), _deviation(rises[o.arm]), '+.3f', '.3f')} nats a token (loss on the task "
        f"{o.mean:.3f})"
        for o in found
    ]
    verdict = f"Mean rise of the loss on other texts: {'; '.join(said)}.{_edges(study, found)}{_learned_alike(study, rows, before)}"
    return Found(verdict, table, drawn)


def _learned_alike(study: Study, rows: Rows, before: Mapping[str, float]) -> str:
    """What each arm forgets for a loss on the task that all of them reach: who learns more may forget more for that alone."""
    points = {arm.name: _learned_and_forgotten(trained(study, rows, arm.name), before) for arm in study.arms}
    reached = max(min(loss for loss, _ in each) for each in points.values())
    least = {name: min(rise for loss, rise in each if loss <= reached) for name, each in points.items()}
    said = "; ".join(f"{name} {rise:+.3f}" for name, rise in least.items())
    return f" At a loss on the task of at most {reached:.3f}, which all reach, the least rise of any rate (first seed) is: {said}."


def _rise(row: Row, before: Mapping[str, float]) -> float:
    return statistics.fmean(loss - before[name] for name, loss in row["probes"]["other-texts"].items())


def _learned_and_forgotten(rows: Sequence[Row], before: Mapping[str, float]) -> list[tuple[float, float]]:
    """Of the first seed, in the order of the rates."""
    first = sorted((r for r in rows if r["seed"] == 0), key=lambda r: float(r["rate"]))
    return [(r["loss"], _rise(r, before)) for r in first]


def _edges(study: Study, found: Sequence[Outcome]) -> str:
    """Which arms might do better at rates that were not tried."""
    ends = {arm.name: (min(arm.rates), max(arm.rates)) for arm in study.arms if len(arm.rates) > 1}
    at_end = ", ".join(o.arm for o in found if o.rate in ends.get(o.arm, ()))
    return f" Best at the lowest or highest rate tried, so that another may be better: {at_end}." if at_end else ""


def _by_rate(study: Study, rows: Rows) -> dict[str, str]:
    """The picture of losses by rate. One training that diverged would leave no height for what the others differ in."""
    found, worst = {arm.name: trained(study, rows, arm.name) for arm in study.arms}, rows["untouched"]["loss"]
    kept = {name: [r for r in own if r["loss"] <= worst] for name, own in found.items()}
    kept = kept if any(kept.values()) else found
    left_out = sum(len(found[name]) - len(own) for name, own in kept.items())
    but = f"; not shown: {left_out} that ended above the untouched base" if left_out else ""
    series = [Series(name, *_curve(own)) for name, own in kept.items()]
    return {f"{study.name}.svg": picture(f"Held-out loss after training{but}", "learning rate", series, power_of_ten)}


def _curve(rows: Sequence[Row]) -> tuple[list[tuple[float, float]], list[float | None]]:
    """Mean loss by the logarithm of the rate, and its spread."""
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        by_rate.setdefault(row["rate"], []).append(row["loss"])
    ordered = sorted(by_rate.items())
    points = [(math.log10(rate), statistics.fmean(losses)) for rate, losses in ordered]
    return points, [_deviation(losses) for _, losses in ordered]


def _against(found: Sequence[Outcome], reference: Outcome) -> str:
    """Each arm beside the reference, and whether two standard errors tell them apart."""
    said = []
    for o in found:
        if o is not reference:
            difference, error = o.mean - reference.mean, math.hypot(o.error, reference.error)
            known = o.spread is not None and reference.spread is not None
            apart = (
                "one seed, so noise is unknown"
                if not known
                else "beyond noise"
                if abs(difference) > 2 * error
                else "within noise"
            )
            said.append(f"{o.arm} {difference / reference.mean:+.1%} ({apart})")
    return f"Held-out loss against {reference.arm}, each at its own best rate: {'; '.join(said)}." if said else ""


def _rates(study: Study, rows: Rows, folder: Path) -> Found:
    """Where the best rate lies for each arm, and how it moves from arm to arm; the curves."""
    rates = sorted({rate for arm in study.arms for rate in arm.rates})
    table = [["", *(f"{rate:g}" for rate in rates), "best rate", "between the rates"]]
    optima = {arm.name: _optima(trained(study, rows, arm.name)) for arm in study.arms}
    for arm in study.arms:
        by_rate = {rate: [r["loss"] for r in trained(study, rows, arm.name) if r["rate"] == rate] for rate in rates}
        cells = [_said(statistics.fmean(x), _deviation(x)) if x else "–" for x in by_rate.values()]
        best = f"{outcome(study, rows, arm.name).rate:g}"
        table.append([arm.name, *cells, best, _power_of_ten_said(list(optima[arm.name].values()))])
    drawn = _by_rate(study, rows)
    found = "; ".join(f"{row[0]} at {row[-1]}" for row in table[1:])
    edges = _edges(study, [outcome(study, rows, arm.name) for arm in study.arms])
    how = "by a parabola through the lowest loss and its neighbours, in logarithms, for each seed"
    return Found(f"Best rate, {how}: {found}.{edges}{_moves(study, optima)}", table, drawn)


def _optima(rows: Sequence[Row]) -> dict[int, float]:
    """By seed, the logarithm of the best rate."""
    return {
        seed: lowest_between([(math.log10(r["rate"]), math.log(r["loss"])) for r in rows if r["seed"] == seed])
        for seed in sorted({r["seed"] for r in rows})
    }


def lowest_between(points: Sequence[tuple[float, float]]) -> float:
    """Where a parabola through the lowest of some points and its neighbours has its vertex; of a lowest at an end, that end."""
    ordered = sorted(points)
    at = min(range(len(ordered)), key=lambda i: ordered[i][1])
    if at in (0, len(ordered) - 1):
        return ordered[at][0]
    (a, over_a), (b, least), (c, over_c) = ordered[at - 1 : at + 2]
    left, right = (b - a) * (least - over_c), (b - c) * (least - over_a)
    bend = 2 * (left - right)
    return b - ((b - a) * left - (b - c) * right) / bend if bend else b


def _power_of_ten_said(logarithms: Sequence[float]) -> str:
    spread = _deviation(logarithms)
    return f"{10 ** statistics.fmean(logarithms):.2g}{'' if spread is None else f' (×/÷ {10**spread:.2f})'}"


def _moves(study: Study, optima: Mapping[str, Mapping[int, float]]) -> str:
    """As which power of a setting the best rate goes along each line of arms."""
    settings, said = {arm.name: arm.settings for arm in study.arms}, []
    for line, names in study.lines.items():
        held = [name for name in names if name in settings]
        x = [math.log10(settings[name][study.over]) for name in held]
        if len(set(x)) > 1:
            seeds = set.intersection(*(set(optima[name]) for name in held))
            slopes = [statistics.linear_regression(x, [optima[n][s] for n in held]).slope for s in sorted(seeds)]
            said.append(f"{line} {_said(statistics.fmean(slopes), _deviation(slopes), '+.2f', '.2f')}")
    of = study.over.rpartition(".")[2]
    return f" As a power of {of} it goes with the exponent: {'; '.join(said)}." if said else ""


def _cost(study: Study, rows: Rows, folder: Path) -> Found:
    table = [["", "seconds a step", "peak memory", "file", "held-out loss"]]
    steps, peaks, sizes = {}, {}, {}
    for arm in study.arms:
        own = trained(study, rows, arm.name)
        each = [r["seconds"] / r["steps"] for r in own]
        steps[arm.name] = statistics.median(each)
        peak, size = max(r["peak_memory_bytes"] for r in own), own[0]["file_bytes"]
        peaks[arm.name], sizes[arm.name] = peak, size
        losses = [r["loss"] for r in own]
        loss = _said(statistics.fmean(losses), _deviation(losses))
        table.append([arm.name, _said(statistics.fmean(each), _deviation(each)), memory(peak), memory(size), loss])
    first, last = study.arms[0].name, study.arms[-1].name
    time, room, file = (steps[last] / steps[first], peaks[last] / peaks[first], sizes[last] / sizes[first])
    verdict = (
        f"Beside {first}, {last} takes {time:.1f} times the time a step (medians), {room:.1f} times the memory, and a file "
        f"{file:.0f} times as large. It runs through the model's own forward, so the time is not that of the method alone; and the "
        "losses, of a few steps at one rate each, compare nothing."
    )
    return Found(verdict, table)


def _spectra(study: Study, rows: Rows, folder: Path) -> Found:
    table = [["", "rank that keeps 90 %", "99 %", "stable rank"]]
    series, means = [], []
    for arm in study.arms:
        own = [r["probes"]["spectra"] for r in trained(study, rows, arm.name)]
        figures = [[float(s[k]) for s in own] for k in ("rank_90", "rank_99", "stable_rank")]
        table.append([arm.name, *(_said(statistics.fmean(f), _deviation(f), ".1f", ".1f") for f in figures)])
        means.append(f"{arm.name} keeps 90 % at rank {statistics.fmean(figures[0]):.1f}")
        energy = {int(r): [float(s["energy"][r]) for s in own] for r in own[0]["energy"]}
        points = [(math.log10(r), statistics.fmean(shares)) for r, shares in energy.items()]
        series.append(Series(arm.name, points, [_deviation(shares) for shares in energy.values()]))
    drawn = {f"{study.name}.svg": picture("Share of an update's energy by rank", "rank", series, power_of_ten)}
    shared = _shared_directions(study, rows, folder)
    table += [["", *("" for _ in TOP)], ["shared directions", *(f"first {k}" for k in TOP)], *shared.table]
    return Found(f"Mean over the modules; {'; '.join(means)}. {shared.verdict}", table, drawn)


def _shared_directions(study: Study, rows: Rows, folder: Path) -> Found:
    """How much of the first directions adapters have in common, of what they read (A) and of what they write (B).

    Two of one arm differ in their seed; of two arms every pair of seeds is taken.
    """
    kept = [(r["arm"], folder / r["adapter"]) for r in rows.values() if r.get("adapter")]
    found = [(arm, {m: decomposed(u) for m, u in updates_of(open_adapter(path)).items()}) for arm, path in kept]
    table, first = [], {}
    for side, of in (("read", lambda d: d.V), ("written", lambda d: d.U)):
        pairs: dict[str, list[list[float]]] = {}
        for (arm, a), (other, b) in combinations(found, 2):
            each = [subspace_similarity(of(a[m]), of(b[m])) for m in a]
            who = f"{arm}, two seeds" if arm == other else f"{arm} and {other}"
            pairs.setdefault(who, []).append([statistics.fmean(float(s[k - 1, k - 1]) for s in each) for k in TOP])
        for who, shares in sorted(pairs.items()):
            cells = [
                _said(statistics.fmean(of_k), _deviation(of_k), ".2f", ".2f") for of_k in zip(*shares, strict=True)
            ]
            table.append([f"{side}: {who}", *cells])
        widths = [len(of(d)) for _, modules in found for d in modules.values()]
        table.append([f"{side}: by chance", *(f"{statistics.fmean(k / width for width in widths):.2f}" for k in TOP)])
        first[side] = statistics.fmean(shares[-1] for own in pairs.values() for shares in own)
    verdict = (
        f"Of the first {TOP[-1]} directions two adapters share on average {first['read']:.0%} of those that they read and "
        f"{first['written']:.0%} of those that they write."
    )
    return Found(verdict, table)


def _proof(study: Study, rows: Rows, folder: Path) -> Found:
    found = [(arm.name, trained(study, rows, arm.name)[0]) for arm in study.arms]
    columns = [[name, *_proof_figures(row).values()] for name, row in found]
    labels = ["", *_proof_figures(found[0][1])]
    table = [list(line) for line in zip(labels, *columns, strict=True)]
    said = " ".join(_proof_words(name, row) for name, row in found)
    return Found(f"{said} Times are medians; in the table, ± is half the distance of the quartiles.", table)


def _proof_figures(row: Row) -> dict[str, str]:
    proof, promises = row["verification"], row["probes"]["promises"]
    times = medians(promises["milliseconds_per_token"])
    return {
        "logits at step 0 that are the base's, bit for bit": _all_of(promises["zero_at_start"], promises),
        "base bit for bit what it was after training": str(row["base_unchanged"]),
        "largest difference of a logit, adapter against merged": f"{proof['max_abs_logit_difference']:.3g}",
        "what the models' own rounding moves a logit": f"{proof['tolerance']:.3g}",
        "what the adapter moves a logit": f"{proof['control_difference']:.3g}",
        "held-out loss, adapter apart": f"{row['loss']:.4f}",
        "held-out loss, merged": f"{row['merged_loss']:.4f}",
        **{f"milliseconds a token, {name}": f"{t:.2f} ± {spread:.2f}" for name, (t, spread) in times.items()},
    }


def _proof_words(name: str, row: Row) -> str:
    proof, promises = row["verification"], row["probes"]["promises"]
    times = {of: t for of, (t, _) in medians(promises["milliseconds_per_token"]).items()}
    merged = (
        "a merged model says what the adapter says, to its own rounding"
        if proof["passed"]
        else f"a merged model is NOT the adapter to its own rounding: a logit differs by {proof['max_abs_logit_difference']:.3g}, "
        f"and rounding moves it {proof['tolerance']:.3g}"
    )
    return (
        f"In {name} a fresh adapter {'changes no bit' if promises['zero_at_start'] else 'CHANGES bits'} of the base's logits; the "
        f"base was {'not written' if row['base_unchanged'] else 'WRITTEN'}; {merged}; a token takes "
        f"{times['merged'] / times['base']:.2f} times the base's time in the merged model and "
        f"{times['adapter apart'] / times['base']:.2f} with the adapter apart."
    )


def _all_of(same: bool, promises: Mapping[str, Any]) -> str:
    return f"{'all' if same else 'NOT all'} of {promises['logits_compared']:,}"
