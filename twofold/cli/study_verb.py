"""twofold study NAME | all [--quick] [--left]: a claim about LoRA, shown by one command"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from tyro.conf import Positional

from twofold.cli.flags import parse, take
from twofold.cli.main import print_json
from twofold.cli.terminal import Terminal, duration, stdout
from twofold.errors import ConfigError, did_you_mean
from twofold.events import Emit, Message
from twofold.recipes.studies import STUDIES, Study
from twofold.recipes.study import outlook, shortened, study
from twofold.recipes.study_paper import write_paper

DESCRIPTION = (
    "Run a study, or all of them one after the other, and write its figures, its pictures and the page that reads them. What was "
    "trained before is not trained again. --quick runs a few examples, to see that it works; --left says what is left to do."
)
BARE = ("--json", "--quick", "--left")


@dataclass(frozen=True, kw_only=True)
class StudyFlags:
    """A study.

    Attributes:
        name: of a study, or all.
        work: the folder of its trainings.
        evidence: where figures, pictures and the page go.
        note: what readers of the page should know of this run, as that the machine was busy.
    """

    name: Positional[str]
    work: Path = Path("runs/studies")
    evidence: Path = Path("docs/evidence")
    note: str = ""


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    arguments, quick = take(arguments, "--quick")
    arguments, only_left = take(arguments, "--left")
    flags = parse(StudyFlags, arguments, verb="study", description=DESCRIPTION, bare=BARE)
    names = list(STUDIES) if flags.name == "all" else [flags.name]
    if unknown := [n for n in names if n not in STUDIES]:
        known = ", ".join((*STUDIES, "all"))
        raise ConfigError(f"no study '{unknown[0]}'{did_you_mean(unknown[0], STUDIES)}; there is {known}")
    with Terminal() as terminal:
        if only_left:
            found = outlook(names, flags.work, shortened if quick else _whole)
        else:
            found = _run(names, flags, terminal, quick=quick)
    print_json(found) if as_json else (_show_left(found) if only_left else _show(found))
    return 0


def _whole(study: Study) -> Study:
    return study


def _run(names: list[str], flags: StudyFlags, emit: Emit, *, quick: bool) -> list[dict[str, Any]]:
    shape = shortened if quick else _whole
    evidence = flags.work / "evidence-quick" if quick else flags.evidence
    found = []
    for name in names:
        found.append(study(shape(STUDIES[name]), flags.work, evidence, emit, note=flags.note))
        write_paper(evidence, STUDIES if not quick else {s.name: s for s in map(shortened, STUDIES.values())})
        emit(Message(text=f"{name}: {found[-1]['verdict']}"))
    return [{k: v for k, v in one.items() if k != "rows"} for one in found]


def _show(found: list[dict[str, Any]]) -> None:
    for one in found:
        head, *rows = one["table"]
        table = Table(*head, box=None, header_style="bold", title=one["claim"], title_justify="left")
        for row in rows:
            table.add_row(*row)
        stdout.print(table)
        stdout.print(
            f"{one['verdict']}\n  {one['trainings']} trainings, {duration(one['compute_seconds'])}; {one['evidence']}"
        )


def _show_left(found: list[dict[str, Any]]) -> None:
    table = Table("study", "done", "of", "left", "budget", box=None, header_style="bold")
    for one in found:
        left = "not known yet" if one["seconds_left"] is None else duration(one["seconds_left"])
        table.add_row(one["study"], str(one["done"]), str(one["planned"]), left, f"{one['budget_hours']:g} h")
    stdout.print(table)
