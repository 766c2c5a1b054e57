"""`twofold studio`: the application in uvicorn, until a signal says otherwise."""

from __future__ import annotations

import logging
import os
import socket
import sys
import webbrowser

import uvicorn
from starlette.applications import Starlette

from twofold.errors import ConfigError
from twofold.events import Emit, Message, Warned
from twofold.studio.app import NOT_BUILT, is_built, make_app
from twofold.studio.settings import StudioConfig, with_token

GRACE_SECONDS = 2
"""For which open streams may end once Studio was told to stop."""


class Server(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, app: Starlette, config: StudioConfig, emit: Emit) -> None:
        super().__init__(
            uvicorn.Config(app, log_config=None, server_header=False, timeout_graceful_shutdown=GRACE_SECONDS)
        )
        self.studio, self.emit = config, emit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets and self.started:
            address = address_of(self.studio, sockets[0].getsockname()[1])
            self.emit(Message(text=f"Studio is at {address}"))
            if self.studio.open and _has_screen():
                webbrowser.open(address)


def studio(config: StudioConfig, emit: Emit) -> None:
    """Serve the page until SIGTERM or SIGINT; trainings that it started go on.

    Raises:
        ConfigError: a root is no folder, or the address cannot be listened on.
    """
    logging.basicConfig(level=logging.WARNING)
    config = with_token(config)
    app = make_app(config)
    if not is_built():
        emit(Warned(text=NOT_BUILT))
    with _listening(config) as listening:
        Server(app, config, emit).run([listening])


def address_of(config: StudioConfig, port: int) -> str:
    """What a browser opens."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{port}/" + (f"?token={config.token}" if config.token else "")


def _listening(config: StudioConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((config.host, config.port))
        found.listen(128)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror}; choose another --port (0 takes any)"
        ) from error
    return found


def _has_screen() -> bool:
    shown = sys.platform in ("darwin", "win32") or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY"))
    return sys.stderr.isatty() and bool(shown)
