"""The engine of Play, in a process of its own: `python -m twofold.studio.engine`.

Its settings come as one line of JSON on stdin, and it ends when stdin does, so that it never outlives the Studio that started it.
What it has to say of loading goes to stdout, a line of JSON each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from twofold.errors import TwofoldError
from twofold.events import Event
from twofold.recipes.serve import ServeConfig
from twofold.server.run import serve

STREAMS = 4
"""Answers side by side: three lanes and one that is just ending."""
POLL_SECONDS = 3600.0
"""Between two looks at the adapter folder: Studio says itself what to load."""


def main() -> int:
    """Serve until stdin ends."""
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    config = ServeConfig(
        base=told["base"],
        adapters=Path(told["adapters"]),
        dtype=told["dtype"],
        name=told["name"],
        port=told["port"],
        api_key=(told["key"],),
        streams=STREAMS,
        poll_seconds=POLL_SECONDS,
        drain_seconds=1.0,
    )
    try:
        serve(config, _say)
    except TwofoldError as error:
        _write({"error": str(error)})
        return 1
    return 0


def _say(event: Event) -> None:
    _write(event.record())


def _write(value: object) -> None:
    print(json.dumps(value), flush=True)


def _end_with_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
