"""`twofold serve`: the application in uvicorn, until a signal says otherwise."""

from __future__ import annotations

import ipaddress
import math
from types import FrameType

import uvicorn
from fastapi import FastAPI

from twofold.events import Emit, Message, Warned
from twofold.recipes.serve import ServeConfig, load_served
from twofold.server.access import log_as_json
from twofold.server.app import make_app
from twofold.server.worker import EngineThread

IDLE_SECONDS = 75
"""For which a connection without requests stays open: longer than proxies keep theirs."""


class Server(uvicorn.Server):
    """On a signal it takes no more requests, not on open connections either, and lets the others end."""

    def __init__(self, app: FastAPI, config: ServeConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=math.ceil(config.drain_seconds),
            )
        )
        self.service = app.state.service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.admission.draining = True
        super().handle_exit(sig, frame)


def serve(config: ServeConfig, emit: Emit) -> None:
    """Load a base and answer requests until SIGTERM or SIGINT.

    Raises:
        UserError: the base or the adapter folder cannot be used.
    """
    thread = EngineThread()
    served = thread.submit(lambda: load_served(config, emit)).result()
    emit(Message(text=served.scheduler.path))
    emit(Message(text=f"http://{config.host}:{config.port}/v1 answers for {' and '.join(served.names)}"))
    if not (is_loopback(config.host) or config.api_key):
        emit(Warned(text=f"whoever reaches {config.host}:{config.port} may use this server; --api-key asks for a key"))
    log_as_json()
    Server(make_app(served, config, thread), config).run()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
