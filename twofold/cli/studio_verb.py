"""twofold studio [--root DIR ... --port 7860 --host 127.0.0.1 --token TOKEN] [--export FILE [--adapter DIR]]"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twofold.cli.flags import parse
from twofold.cli.terminal import Terminal
from twofold.studio.export import export_lesson
from twofold.studio.run import studio
from twofold.studio.settings import StudioConfig

DESCRIPTION = (
    "See LoRA, and work on runs and adapters, in a browser. With --export, write the lesson as one file instead."
)


@dataclass(frozen=True, kw_only=True)
class StudioFlags(StudioConfig):
    """The local web page: lesson, planner, training, inspection and chat.

    Attributes:
        export: write the lesson to this file, which opens without a network, and serve nothing.
        adapter: the folder of the adapter that an exported lesson is about; the one that ships, if not given.
    """

    export: Path | None = None
    adapter: Path | None = None


def run(arguments: list[str]) -> int:
    flags = parse(StudioFlags, arguments, verb="studio", description=DESCRIPTION, bare=())
    if flags.export is not None:
        export_lesson(flags.export, flags.adapter)
        return 0
    with Terminal() as terminal:
        studio(flags, terminal)
    return 0
