"""What a Studio is made of."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from twofold.studio.asking import Desk
from twofold.studio.play import Play
from twofold.studio.roots import Roots
from twofold.studio.runbook import RunBook
from twofold.studio.settings import StudioConfig


@dataclass(frozen=True)
class Studio:
    """Everything behind the routes."""

    config: StudioConfig
    roots: Roots
    desk: Desk
    runs: RunBook
    play: Play
    one_preflight: asyncio.Lock = field(default_factory=asyncio.Lock)
