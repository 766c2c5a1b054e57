"""The page that reads the studies: docs/evidence/README.md, written from their JSON files and a discussion beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twofold import atomic
from twofold.recipes.studies import Study
from twofold.recipes.words import duration

INTRODUCTION = """# Claims about LoRA, measured

This page is written by `twofold study` from the JSON files beside it; every figure in it was measured by a command that it
names. What was not run says so. Run everything that is missing with

```text
twofold study all            # resumes where it stopped; --left says what is left, by the trainings so far
```

## How

Bases are SmolLM2-135M-Instruct (GGUF in 4 bits, unpacked to 16) and, for sentiment, MiniLM-L6 (22.7 million parameters). Tasks
are home commands to JSON intents, held out by sentence template; modern to King James English, held out by book; and the
sentiment of film reviews. All are small, so what is shown is small too: one epoch over one or two hundred examples, which is
a dozen steps at most, with held-out sets of 32 to 96; three epochs in matches-full-longer, and a thousand reviews for sentiment. A
dozen steps compare how fast arms learn, and not what they can hold in the end: nothing here speaks of models of billions, or of
training that fills an adapter's capacity.

Where a table says how many intents and answers are right, the model was asked all held-out commands, greedily and without a
grammar: an answer is right if its JSON is the expected one, slots and all.

Every arm is compared at its own best learning rate: all its rates are tried with one seed, and the best runs with the other seeds.
± is the standard deviation over seeds, which draw the start and the order of the data. Two arms are told apart where their means
differ by more than two standard errors of the difference. With three seeds that is a rough test, and the best of several rates,
chosen on the same held-out data, looks a little better than it is, for every arm alike. Adapters are all-linear with alpha = 32
unless a table says otherwise, but for PiSSA (16) and, at every rank, alpha/sqrt(r) (8) and no scale (2 r), which agree with alpha/r
at r = 16; AdamW without weight decay, a cosine schedule, batches of 16.

Full fine-tuning is `twofold train --full`: the same data, order, loss and evaluation, with float32 copies of the weights where
they have 16 bits. It runs through the model's own forward, as adapters do only on families without a fast path.
"""
DISCUSSION = "discussion.md"
"""What people make of the figures, which no program says."""


def write_paper(evidence: Path, studies: Mapping[str, Study]) -> Path:
    """Write the page into the folder of the studies' files.

    Raises:
        RunError: it cannot be written.
    """
    found = {name: _read(evidence / f"{name}.json") for name in studies}
    discussion = evidence / DISCUSSION
    parts = [INTRODUCTION, "\n".join(_summary(studies, found))]
    parts += [discussion.read_text(encoding="utf-8")] if discussion.is_file() else []
    parts += ["\n".join(_section(studies[name], report)) for name, report in found.items() if report]
    parts += ["\n".join(_missing([studies[name] for name, report in found.items() if report is None]))]
    path = evidence / "README.md"
    atomic.write_text(path, "\n".join(part for part in parts if part))
    return path


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _summary(studies: Mapping[str, Study], found: Mapping[str, dict[str, Any] | None]) -> Iterator[str]:
    yield "## In short\n"
    yield "| claim | what was seen |\n|---|---|"
    for name, report in found.items():
        seen = f"{report['verdict']} ([{name}](#{name}))" if report else "not run yet"
        yield f"| {studies[name].claim} | {seen} |"
    yield ""


def _section(study: Study, report: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {study.name}\n"
    yield f"**Claim.** {study.claim}. In the literature: {study.expected}.\n"
    yield f"**Seen.** {report['verdict']}\n"
    yield from _table(report["table"])
    for picture in report["pictures"]:
        yield f"\n![{study.claim}]({picture})"
    spent = duration(report["compute_seconds"]).replace("\u00a0", " ")
    count = report["trainings"]
    note = f"{report['note'].rstrip('.')}. " if report["note"] else ""
    where = f"{report['dtype']} on {report['threads']} thread{'s' * (report['threads'] > 1)} of a {report['device'].upper()}"
    yield (
        f"\n{count} training{'s' * (count > 1)} on {report['examples']:,} examples of {report['material']}, {report['held_out']} "
        f"held out, {where}; {spent} of computing, of {report['budget_hours']:g} h that it may take on two cores. {note}"
        f"Every training is in [{study.name}.json]({study.name}.json); `twofold study {study.name}` makes it again.\n"
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    width = max(map(len, rows))
    for i, row in enumerate(rows):
        yield f"| {' | '.join([*row, *[''] * (width - len(row))])} |"
        if i == 0:
            yield "|" + "---|" * width


def _missing(studies: Sequence[Study]) -> Iterator[str]:
    if not studies:
        return
    yield "## Not run yet\n"
    for study in studies:
        yield f"- `twofold study {study.name}`: {study.claim} (budget {study.hours:g} h on 2 cores)."
    yield ""
