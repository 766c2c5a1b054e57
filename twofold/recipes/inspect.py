"""`twofold inspect` and `twofold compare`: adapters, module by module, from their factors; a base is streamed from disk."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from twofold.adapter.files import AdapterFiles, open_adapter
from twofold.adapter.shapes import module_shapes
from twofold.base.fingerprint import check_same_base
from twofold.base.streamed import StreamedBase, open_streamed
from twofold.errors import ConfigError, ForeignBaseError
from twofold.events import Emit, silent
from twofold.inspection.against_base import beside_base, lint_against
from twofold.inspection.compare import Comparison, compare_adapters
from twofold.inspection.lint import Finding
from twofold.inspection.report import AdapterReport, report_adapter
from twofold.lowrank.intruders import intruders as intruders_in_few_passes
from twofold.lowrank.intruders import intruders_exactly
from twofold.recipes.adapters import open_finite, recorded_head

DIRECTIONS = 10
"""How many of the largest directions of a changed weight are looked at for intruders (arXiv 2410.21228)."""


def inspect_adapter(
    path: Path | str,
    base: str | None = None,
    *,
    intruders: int = 0,
    exact: bool = False,
    emit: Emit = silent,
) -> AdapterReport:
    """Norms, ranks and findings of an adapter folder, and what they are beside a base.

    Args:
        base: a reference of the base, read one weight at a time; without one, the adapter alone speaks.
        intruders: of how many of each changed weight's largest directions to ask whether they are new; 0 for none.
        exact: find them by whole decompositions of every weight.

    Raises:
        AdapterFileError: the folder is damaged or not understood.
        BaseError: no such base, or it does not lie on disk as safetensors.
        ConfigError: intruders are asked for without a base, or exact ones without asking for them.
    """
    if intruders and base is None:
        raise ConfigError("intruders are directions that the base has not: name it with --base")
    if exact and not intruders:
        raise ConfigError("--exact says how intruders are found: it goes with --intruders")
    files = open_adapter(Path(path))
    if base is None:
        return report_adapter(files)
    streamed = open_streamed(base, recorded_head([files.path]))
    shapes = module_shapes(streamed.model)
    findings = [*_known_base(files, streamed), *lint_against(files, shapes)]
    search = intruders_exactly if exact else intruders_in_few_passes
    look = partial(search, k=intruders) if intruders else None
    return report_adapter(files, beside_base(files, shapes, streamed, look, emit), findings)


def _known_base(files: AdapterFiles, base: StreamedBase) -> list[Finding]:
    recorded, ours = files.provenance.base if files.provenance else None, base.fingerprint()
    if recorded is None or ours is None:
        said = f"{files.path.name} names no fingerprint of its base, so only shapes were compared with {base.reference}"
        return [Finding("note", "no-fingerprint", said)]
    try:
        said_of_it = check_same_base(recorded, ours, files.path.name)
    except ForeignBaseError as error:
        return [Finding("error", "foreign-base", str(error))]
    return [Finding("note", "other-precision", said_of_it)] if said_of_it else []


def compare(first: Path | str, second: Path | str) -> Comparison:
    """How alike the updates of two adapter folders are.

    Raises:
        AdapterFileError: a folder is damaged or not understood, or holds NaN or infinity.
        ConfigError: they have no module in common, or of other shapes.
    """
    return compare_adapters(open_finite(Path(first)), open_finite(Path(second)))
