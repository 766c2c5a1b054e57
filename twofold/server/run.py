"""`twofold serve`: the application in uvicorn, until a signal says otherwise."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from twofold.errors import ConfigError
from twofold.events import Emit, Message, Warned
from twofold.recipes.serve import ServeConfig, load_served
from twofold.server.access import log_as_json
from twofold.server.app import make_app
from twofold.server.worker import EngineThread

IDLE_SECONDS = 75
"""For which a connection without requests stays open: longer than proxies keep theirs."""
LAST_WORDS = 3
"""Seconds after the drain in which clients may read how their answers ended."""


class Server(uvicorn.Server):
    """On a signal it takes no more requests, not on open connections either, and lets the others end.

    Args:
        emit: is told the address, once it can be asked there.
    """

    def __init__(self, app: FastAPI, config: ServeConfig, emit: Emit) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=math.ceil(config.drain_seconds) + LAST_WORDS,
            )
        )
        self.service, self._emit = app.state.service, emit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            address = url_of(self.config.host, self.servers[0].sockets[0].getsockname()[1])
            names = " and ".join(self.service.registry.base_names)
            self._emit(Message(text=f"{address}/v1 answers for {names}"))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.admission.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = asyncio.get_running_loop().call_later(self.service.config.drain_seconds, self.service.requests.end)
        await super().shutdown(sockets)
        end.cancel()


def serve(config: ServeConfig, emit: Emit) -> None:
    """Load a base and answer requests until SIGTERM or SIGINT.

    Raises:
        UserError: the address, the base or the adapter folder cannot be used.
    """
    check_address(config.host, config.port)
    thread = EngineThread()
    served = thread.submit(lambda: load_served(config, emit)).result()
    emit(Message(text=served.scheduler.path))
    if not (is_loopback(config.host) or config.api_key):
        emit(Warned(text=f"whoever reaches {config.host}:{config.port} may use this server; --api-key asks for a key"))
    log_as_json()
    Server(make_app(served, config, thread), config, emit).run()


def check_address(host: str, port: int) -> None:
    """Look whether an address is free, before anything is loaded.

    Raises:
        ConfigError: it is not one of this machine, or somebody listens there.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, UnicodeError) as error:
        why = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise ConfigError(f"cannot listen on {host}:{port}: {why}; choose another --port or --host") from error


def url_of(host: str, port: int) -> str:
    """Where to ask a server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
