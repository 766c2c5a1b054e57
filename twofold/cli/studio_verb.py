"""twofold studio [--root DIR ... --port 7860 --host 127.0.0.1 --token TOKEN]"""

from __future__ import annotations

from twofold.cli.flags import parse
from twofold.cli.terminal import Terminal
from twofold.studio.run import studio
from twofold.studio.settings import StudioConfig


def run(arguments: list[str]) -> int:
    config = parse(
        StudioConfig, arguments, verb="studio", description="See LoRA, and work on runs, in a browser.", bare=()
    )
    with Terminal() as terminal:
        studio(config, terminal)
    return 0
